"""What heartbeats cannot know yet."""

from __future__ import annotations


class Ledger:
    """Amounts that this router placed on a worker and that the worker's heartbeats do not count yet.

    A worker that has taken one says from which of its heartbeats on it is counted there: one that was on its way
    meanwhile does not end the entry. What no worker has taken stays here.
    """

    def __init__(self) -> None:
        self._placed: dict[str, int] = {}
        # Entries that were taken, and the number of the first heartbeat that counts them.
        self._taken: dict[str, int] = {}
        # The number of the last heartbeat.
        self._heard = 0

    def place(self, key: str, amount: int) -> None:
        self._placed[key] = amount

    def taken(self, key: str, counted_from: int) -> None:
        """counted_from: the number of the first heartbeat that counts it; it may have come already."""
        if key in self._placed:
            self._taken[key] = counted_from
            self.heartbeat(self._heard)

    def drop(self, key: str) -> None:
        self._placed.pop(key, None)
        self._taken.pop(key, None)

    def heartbeat(self, number: int) -> None:
        self._heard = number
        for key in [key for key, counted_from in self._taken.items() if counted_from <= number]:
            self.drop(key)

    @property
    def total(self) -> int:
        return sum(self._placed.values())

    def __len__(self) -> int:
        return len(self._placed)
