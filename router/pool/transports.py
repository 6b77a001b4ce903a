"""By which transport KV goes between two workers: a pure choice from what both announced."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tandem.errors import Unavailable
from tandem.v1 import registry_pb2

LOCAL = "local"
GRPC = "grpc"
RAY = "ray"
SHM = "shm"
NIXL = "nixl"
# On one node, and from this much KV on, Ray's object store is faster than gRPC (docs/kv_transfer.md has the figures).
RAY_WINS_BYTES = 16 << 20
_Announced = Iterable[registry_pb2.Transport]


def pick(order: str, source: _Announced, target: _Announced, kv_bytes: int) -> str:
    """order: router.transport. Raises Unavailable when the two workers do not share what it asks for."""
    shared = _shared(source, target)
    wanted = order
    if order == "auto":
        wanted = _best(shared, kv_bytes)
    if wanted not in shared:
        common = ", ".join(sorted(shared)) or "none"
        raise Unavailable(f"two workers do not share the KV transport {wanted}; in common they have: {common}")
    return wanted


def _best(shared: Mapping[str, bool], kv_bytes: int) -> str:
    if shared.get(SHM):
        return SHM
    if shared.get(NIXL):  # from GPU to GPU
        return NIXL
    return RAY if shared.get(RAY) and kv_bytes >= RAY_WINS_BYTES else GRPC


def _shared(source: _Announced, target: _Announced) -> dict[str, bool]:
    """The transports that both can use together, and whether they are near to each other in it."""
    ours = {each.name: each for each in source}
    shared = {}
    for theirs in target:
        mine = ours.get(theirs.name)
        if mine is not None and mine.domain == theirs.domain:
            shared[theirs.name] = mine.node == theirs.node != ""
    return shared
