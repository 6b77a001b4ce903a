"""By which transport KV goes between two workers: a pure choice from what both announced."""

from __future__ import annotations

from collections.abc import Iterable

from tandem.errors import Unavailable
from tandem.v1 import registry_pb2

LOCAL = "local"
GRPC = "grpc"
# What two workers can be told to use, best first; each wins only between workers that it is near to: see `near`.
_PREFERRED_WHEN_NEAR = ("ray",)
_Announced = Iterable[registry_pb2.Transport]


def pick(order: str, source: _Announced, target: _Announced) -> str:
    """order: router.transport. Raises Unavailable when the two workers do not share what it asks for."""
    shared = _shared(source, target)
    if order == "auto":
        near = [name for name in _PREFERRED_WHEN_NEAR if shared.get(name)]
        wanted = near[0] if near else GRPC
    else:
        wanted = order
    if wanted not in shared:
        common = ", ".join(sorted(shared)) or "none"
        raise Unavailable(f"two workers do not share the KV transport {wanted}; in common they have: {common}")
    return wanted


def _shared(source: _Announced, target: _Announced) -> dict[str, bool]:
    """The transports that both can use together, and whether they are near to each other in it."""
    ours = {each.name: each for each in source}
    shared = {}
    for theirs in target:
        mine = ours.get(theirs.name)
        if mine is not None and mine.domain == theirs.domain:
            shared[theirs.name] = mine.node == theirs.node != ""
    return shared
