"""What this router has placed on a worker and not taken back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from router.pool.pace import PrefillPace
from router.pool.subscriptions import TokenSubscription
from tandem.errors import TandemError
from tandem.types import Role

OnLoss = Callable[[TandemError], object]


class Ledger:
    """Amounts that this router placed on a worker and that the worker's heartbeats do not count yet.

    A worker that has taken one says from which of its heartbeats on it is counted there: one that was on its way
    meanwhile does not end the entry. What no worker has taken stays here.
    """

    def __init__(self) -> None:
        self._placed: dict[str, int] = {}
        # Entries that were taken, and the number of the first heartbeat that counts them.
        self._taken: dict[str, int] = {}
        self._last_heartbeat = 0

    def place(self, key: str, amount: int) -> None:
        self._placed[key] = amount

    def taken(self, key: str, counted_from: int) -> None:
        """counted_from: the number of the first heartbeat that counts it; it may have come already."""
        if key in self._placed:
            self._taken[key] = counted_from
            self.heartbeat(self._last_heartbeat)

    def drop(self, key: str) -> None:
        self._placed.pop(key, None)
        self._taken.pop(key, None)

    def heartbeat(self, number: int) -> None:
        self._last_heartbeat = number
        for key in [key for key, counted_from in self._taken.items() if counted_from <= number]:
            self.drop(key)

    @property
    def total(self) -> int:
        return sum(self._placed.values())

    def __len__(self) -> int:
        return len(self._placed)


class Books:
    """All that attempts have on one worker."""

    def __init__(self) -> None:
        # Prompt tokens to compute, and blocks to reserve.
        self.queued, self.promised = Ledger(), Ledger()
        self.prefill_pace = PrefillPace()
        self.subscription = TokenSubscription()
        # Reservations of live requests; their leases are renewed.
        self.leases: set[str] = set()
        # What to call when the worker is lost, for everything that depends on it in a role.
        self.live: dict[tuple[str, Role], OnLoss] = {}

    def heartbeat(self, number: int) -> None:
        self.queued.heartbeat(number)
        self.promised.heartbeat(number)

    @contextmanager
    def expecting(self, key: str, tokens: int) -> Iterator[None]:
        """While a request waits for decode blocks, its prompt counts as queued, and holds no worker back."""
        self.queued.place(key, tokens)
        try:
            yield
        finally:
            self.queued.drop(key)
