"""What the prefix cache gained and lost since somebody was last told of it."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from tandem.prefix import CacheChanges


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
