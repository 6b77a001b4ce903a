"""Which blocks of the KV pool are free, held or cached. Block ids and token ids only: no tensors here.

A block holds the K and V of `block_size` consecutive tokens of one sequence, in every layer. Full blocks are named
by all tokens up to their end (tandem/prefix.py), so that a later prompt with the same beginning finds them.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

from tandem.errors import InternalError, TransferFailed
from tandem.prefix import CacheChanges

# Blocks that an integrity check looks at before it lets others in for a moment: about a millisecond's.
CHECKED_AT_ONCE = 4096
PAUSE_S = 1e-4


@dataclass(frozen=True)
class PoolReport:
    """What check_integrity found. A pool with no live request has zero referenced and zero quarantined blocks."""

    total: int
    free: int
    referenced: int
    quarantined: int
    # The first broken invariant, or "".
    problem: str = ""


class BlockPool:
    """Reference counts, the free list and the prefix cache.

        free ──acquire──▶ referenced ──last release──▶ free, still cached ──acquire by another──▶ referenced (evicted)
                              ▲                              │
                              └────── acquire by hash ◀──────┘

    Thread-safe: the event loop reserves blocks while the engine's thread steps. Every call takes microseconds.
    """

    def __init__(self, num_blocks: int, block_size: int, prefix_cache: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._prefix_cache = prefix_cache
        self._refs = [0] * num_blocks
        # Least recently used first; a block that is cached but unreferenced waits here for either fate.
        self._free: OrderedDict[int, None] = OrderedDict((block, None) for block in range(num_blocks))
        self._hash_of: dict[int, bytes] = {}
        self._by_hash: dict[bytes, int] = {}
        self._journal = PrefixJournal()
        self._quarantined = 0
        # Called after blocks came back, from whatever thread gave them; must not block.
        self.on_free: Callable[[], object] = lambda: None
        self._lock = threading.Lock()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_quarantined(self) -> int:
        return self._quarantined

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def acquire(self, num_blocks: int, hashes: Sequence[bytes] = ()) -> BlockTable | None:
        """A table of num_blocks blocks, the leading ones from the prefix cache as far as `hashes` match.

        None when the pool has too few free blocks; nothing is held then.
        """
        with self._lock:
            cached = self._match(hashes)
            revived = sum(1 for block in cached if self._refs[block] == 0)
            if num_blocks - len(cached) > len(self._free) - revived:
                return None
            for block in cached:
                self._free.pop(block, None)
            fresh = [self._evict_one() for _ in range(num_blocks - len(cached))]
            for block in (*cached, *fresh):
                self._refs[block] += 1
        return BlockTable(self, (*cached, *fresh), len(cached) * self.block_size)

    def publish(self, block: int, block_hash: bytes) -> None:
        """Names a held, full block so that others may share it. The first block of a name keeps it."""
        if not self._prefix_cache:
            return
        with self._lock:
            if block_hash not in self._by_hash and block not in self._hash_of:
                self._by_hash[block_hash] = block
                self._hash_of[block] = block_hash
                self._journal.gain(block_hash)

    def cache_changes(self, limit: int, restart: bool = False) -> CacheChanges:
        """What the prefix cache lost and gained since the last call, at most `limit` names; the rest comes next time.

        restart: for a new listener, who knows nothing yet.
        """
        with self._lock:
            if restart:
                self._journal.restart(self._by_hash)
            return self._journal.take(limit)

    def check_integrity(self) -> PoolReport:
        """Counts every block and checks the invariants, in slices between which others take and give blocks.

        Takes 0.2 s for a million blocks, so not in the event loop; nobody waits for longer than a slice.
        """
        starts = range(0, self.num_blocks, CHECKED_AT_ONCE)
        problem = next(filter(None, map(self._first_problem, starts)), "")
        with self._lock:
            if not problem and len(self._hash_of) != len(self._by_hash):
                problem = "the prefix cache names a block by another's hash, or one twice"
            # What is not free is referenced: the slices have shown it.
            free = len(self._free)
            return PoolReport(self.num_blocks, free, self.num_blocks - free, self._quarantined, problem)

    def _first_problem(self, start: int) -> str:
        """The first broken invariant of a slice; empty when there is none."""
        with self._lock:
            blocks = range(start, min(start + CHECKED_AT_ONCE, self.num_blocks))
            found = next(filter(None, map(self._problem, blocks)), "")
        time.sleep(PAUSE_S)  # a lock that is taken again at once is got by nobody else
        return found

    def _problem(self, block: int) -> str:
        refs, free, block_hash = self._refs[block], block in self._free, self._hash_of.get(block)
        if refs < 0 or (refs == 0) != free:
            return f"block {block} has {refs} references and is {'' if free else 'not '}free"
        if block_hash is not None and self._by_hash.get(block_hash) != block:
            return f"the prefix cache names block {block} by another's hash"
        return ""

    def _match(self, hashes: Sequence[bytes]) -> list[int]:
        found: list[int] = []
        for block_hash in hashes:
            block = self._by_hash.get(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def _evict_one(self) -> int:
        block, _ = self._free.popitem(last=False)
        block_hash = self._hash_of.pop(block, None)
        if block_hash is not None:
            del self._by_hash[block_hash]
            self._journal.lose(block_hash)
        return block

    def give_back(self, blocks: Sequence[int], quarantined: bool) -> None:
        with self._lock:
            if quarantined:
                self._quarantined -= len(blocks)
            # Last blocks first: a chain is of use only from its beginning, so its end is evicted first.
            for block in reversed(blocks):
                self._refs[block] -= 1
                if self._refs[block] == 0:
                    self._free[block] = None
                if self._refs[block] < 0:
                    raise InternalError(f"block {block} released twice")
        self.on_free()

    def quarantine(self, blocks: Sequence[int]) -> None:
        with self._lock:
            self._quarantined += len(blocks)


class BlockTable:
    """The blocks that one request holds, in the order of its tokens; released exactly once, whoever asks first.

    A thread that reads or writes the blocks' memory does so inside `in_use()`. Blocks released meanwhile are
    quarantined: they go back to the pool when the last user leaves, so a late write never lands in blocks that
    somebody else got (law 5).
    """

    def __init__(self, pool: BlockPool, blocks: tuple[int, ...], cached_tokens: int) -> None:
        self.blocks = blocks
        # Leading tokens whose KV the prefix cache already holds.
        self.cached_tokens = cached_tokens
        self._pool = pool
        self._users = 0
        self._released = False
        self._lock = threading.Lock()

    @property
    def released(self) -> bool:
        return self._released

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keeps the blocks from reuse while inside. Raises TransferFailed when they are released already."""
        with self._lock:
            if self._released:
                raise TransferFailed("the request's blocks were released")
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                last = self._released and self._users == 0
            if last:
                self._pool.give_back(self.blocks, quarantined=True)

    def release(self) -> None:
        """Gives the blocks back, now or when the last user leaves. A second call does nothing."""
        with self._lock:
            if self._released:
                return
            self._released = True
            busy = self._users > 0
            if busy:
                self._pool.quarantine(self.blocks)
        if not busy:
            self._pool.give_back(self.blocks, quarantined=False)


class PrefixJournal:
    """The difference between the cache and what was told: gained = cache - told, lost = told - cache.

    A name that comes and goes between two tellings leaves no trace, and losses are told first, so neither set ever
    holds more names than the pool has blocks: a journal cannot overflow. Whoever uses it holds the pool's lock.
    """

    def __init__(self) -> None:
        # Dicts for their order: the oldest change is told first, so a chain's beginning comes before its end.
        self._gained: dict[bytes, None] = {}
        self._lost: dict[bytes, None] = {}
        self._reset = False

    def gain(self, name: bytes) -> None:
        if name in self._lost:
            del self._lost[name]
        else:
            self._gained[name] = None

    def lose(self, name: bytes) -> None:
        if name in self._gained:
            del self._gained[name]
        else:
            self._lost[name] = None

    def restart(self, cached: Iterable[bytes]) -> None:
        """Nothing has been told yet to whoever listens from now on."""
        self._gained, self._lost, self._reset = dict.fromkeys(cached), {}, True

    def take(self, limit: int) -> CacheChanges:
        """The oldest changes, at most `limit` names; they count as told."""
        lost = tuple(islice(self._lost, limit))
        gained = tuple(islice(self._gained, limit - len(lost)))
        for name in lost:
            del self._lost[name]
        for name in gained:
            del self._gained[name]
        changes, self._reset = CacheChanges(self._reset, lost, gained), False
        return changes
