"""By which transport KV goes between two workers: a pure choice from what both announced."""

from __future__ import annotations

from collections.abc import Iterable

from tandem.errors import Unavailable
from tandem.v1 import registry_pb2

# Within one worker: nothing moves, and nobody announces it.
LOCAL = "local"
# Every worker has it, and it goes anywhere.
GRPC = "grpc"
_Announced = Iterable[registry_pb2.Transport]


def pick(order: str, source: _Announced, target: _Announced, kv_bytes: int) -> str:
    """order: router.transport. Raises Unavailable when the two workers do not share what it asks for."""
    ours = {each.name: each for each in source}
    shared = [(ours[each.name], each) for each in target if each.name in ours and ours[each.name].domain == each.domain]
    names = {mine.name for mine, _ in shared}
    wanted = order
    if order == "auto":
        rank, best = max(((_rank(*pair, kv_bytes), pair[0].name) for pair in shared), default=(0, GRPC))
        wanted = best if rank else GRPC
    if wanted not in names:
        common = ", ".join(sorted(names)) or "none"
        raise Unavailable(f"two workers do not share the KV transport {wanted}; in common they have: {common}")
    return wanted


def _rank(mine: registry_pb2.Transport, theirs: registry_pb2.Transport, kv_bytes: int) -> int:
    """How good it is between these two; 0: not to be chosen."""
    if mine.node != theirs.node or kv_bytes < max(mine.least_kv_bytes, theirs.least_kv_bytes):
        return 0
    return min(mine.rank, theirs.rank)
