"""What the router knows of one worker's prefix cache, from its heartbeats."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Sequence

from tandem.prefix import CacheChanges, chain_hashes

# Naming runs at several million tokens a second: so many blocks hold the event loop for a millisecond or two.
SLICE_BLOCKS = 256


class PrefixIndex:
    """The names of the blocks that a worker has cached, as of its last heartbeat, and of those that it must have
    cached since. Only a hint: a worker looks into its own cache when the request comes.
    """

    def __init__(self, limit: int) -> None:
        """limit: blocks in the worker's pool; names over that are ignored, so the index is bounded by it."""
        self._limit = limit
        self._names: set[bytes] = set()
        # Until the next heartbeat, which knows better.
        self._expected: set[bytes] = set()

    def __len__(self) -> int:
        """Blocks that it has told of."""
        return len(self._names)

    def expect(self, names: Sequence[bytes]) -> None:
        """A prompt has just been computed there, or has arrived: the next one finds it without waiting for a
        heartbeat to tell."""
        self._expected.update(names[: self._limit - len(self._expected)])

    def apply(self, changes: CacheChanges) -> None:
        """A heartbeat's."""
        self._expected.clear()
        if changes.reset:
            self._names.clear()
        self._names.difference_update(changes.lost)
        self._names.update(changes.gained[: self._limit - len(self._names)])

    def leading(self, names: Sequence[bytes]) -> int:
        """How many of a prompt's first blocks are cached.

        By halving, which holds the event loop for microseconds however long the prompt is: a pool evicts the end of a
        chain first, so the cached blocks come first. Where a chain's very beginning is gone, nothing is.
        """
        if not names or self._lacks(names[0]):
            return 0
        return bisect_left(names, True, key=self._lacks)

    def _lacks(self, name: bytes) -> bool:
        return name not in self._names and name not in self._expected


async def name_blocks(prompt_ids: Sequence[int], block_size: int, salt: str) -> tuple[bytes, ...]:
    """The names of a prompt's full blocks. A long prompt's in slices, between which the event loop goes on (law 6)."""
    names: list[bytes] = []
    for start in range(0, len(prompt_ids), SLICE_BLOCKS * block_size):
        if start:
            await asyncio.sleep(0)
        tokens = prompt_ids[start : start + SLICE_BLOCKS * block_size]
        names += chain_hashes(names[-1] if names else None, tokens, block_size, salt)
    return tuple(names)
