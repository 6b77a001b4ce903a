"""Names of KV blocks: what workers' prefix caches hold and what the router looks for. No torch, no gRPC.

A name is a hash chained over all tokens from the beginning of the sequence to the block's end, so that equal names
mean equal KV (the hash chain of vLLM's "automatic prefix caching" design).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

# Bytes of a name.
NAME_BYTES = 16
# Names, gained and lost together, in one heartbeat: 64 KiB. What is over that goes with the next ones.
MAX_CHANGES = 4096


def chain_hashes(parent: bytes | None, tokens: Sequence[int], block_size: int, salt: str = "") -> list[bytes]:
    """The names of the full blocks in `tokens`, which follow the block named `parent` (None: they begin a sequence).

    A name covers every token from the beginning of the sequence; tenants with different salts share no name.
    """
    if parent is None:
        parent = hashlib.blake2b(salt.encode(), digest_size=NAME_BYTES).digest()
    packed, size = struct.pack(f"<{len(tokens)}I", *tokens), 4 * block_size
    names = []
    for start in range(0, len(packed) - size + 1, size):
        parent = hashlib.blake2b(parent + packed[start : start + size], digest_size=NAME_BYTES).digest()
        names.append(parent)
    return names


@dataclass(frozen=True)
class CacheChanges:
    """What a prefix cache lost and gained since it was last told; lost names are applied first."""

    # The first changes after a (re)join: what was told before is void.
    reset: bool = False
    lost: tuple[bytes, ...] = ()
    # Beginnings of a chain before its end.
    gained: tuple[bytes, ...] = ()
