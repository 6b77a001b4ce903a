"""Failed calls in the client's words."""

from __future__ import annotations

import grpc

from tandem import errors, rpc


def explain(error: grpc.RpcError, address: str) -> errors.TandemError:
    """The TandemError of a failed call. What gRPC itself said, and not the router, gets the missing context."""
    known = rpc.error_from_rpc(error)
    if rpc.said_by_tandem(error):
        return known
    if isinstance(known, errors.Unavailable):
        return errors.Unavailable(f"cannot reach a Tandem router at {address}: {known.message}")
    if isinstance(known, errors.Overloaded) and "larger than max" in known.message:
        return errors.InvalidRequest(f"the request is too large for the router: {known.message}", field="prompt")
    if isinstance(known, errors.DeadlineExceeded):
        return errors.DeadlineExceeded("the deadline (timeout_s) passed before the answer was complete")
    return known
