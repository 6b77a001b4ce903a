"""Failed calls in the client's words."""

from __future__ import annotations

import re

import grpc

from tandem import errors, rpc

# In gRPC's words for an answer that is not HTTP/2; silence is another matter ("timed out before receiving SETTINGS").
_OTHER_PROTOCOL = re.compile("got frame type|trying to connect an http1", re.IGNORECASE)
# In gRPC's words for a call that this very process ended.
_ENDED_HERE = re.compile("locally cancelled|channel closed", re.IGNORECASE)


def explain(error: grpc.RpcError, address: str) -> errors.TandemError:
    """The TandemError of a failed call. What gRPC itself said, and not the router, gets the missing context."""
    known = rpc.error_from_rpc(error)
    if rpc.said_by_tandem(error):
        return known
    if isinstance(known, errors.Refused):
        words = "is not a Tandem router, or an older one: it does not know the call"
        return errors.Refused(f"what answers at {address} {words}")
    if isinstance(known, errors.Unavailable) and _OTHER_PROTOCOL.search(known.message):
        words = "does not speak gRPC; is this its HTTP port, or not a Tandem router?"
        return errors.Unavailable(f"what answers at {address} {words}")
    if isinstance(known, errors.Unavailable):
        return errors.Unavailable(f"cannot reach a Tandem router at {address}: {known.message}")
    if isinstance(known, errors.Overloaded) and "larger than max" in known.message:
        return errors.InvalidRequest(f"the request is too large for the router: {known.message}", field="prompt")
    # gRPC's server says no more than CANCELLED to calls beyond those that may wait (rpc.server_options).
    turned_away = isinstance(known, errors.Cancelled) and not _ENDED_HERE.search(known.message)
    if isinstance(known, errors.Overloaded) or turned_away:
        words = f"the router has more calls waiting than it takes, and its gRPC turned this one away: {known.message}"
        return errors.Overloaded(words, retry_after_ms=errors.RETRY_AFTER_MS)
    if isinstance(known, errors.DeadlineExceeded):
        return errors.DeadlineExceeded("the deadline (timeout_s) passed before the answer was complete")
    return known
