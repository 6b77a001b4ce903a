"""What heartbeats cannot know yet."""

from __future__ import annotations


class Ledger:
    """Amounts that this router placed on a worker and that the worker's heartbeats do not count yet.

    An entry that was sent to the worker is counted there from its next heartbeat on; one that was not stays here.
    """

    def __init__(self) -> None:
        self._placed: dict[str, int] = {}
        self._sent: set[str] = set()

    def place(self, key: str, amount: int) -> None:
        self._placed[key] = amount

    def sent(self, key: str) -> None:
        if key in self._placed:
            self._sent.add(key)

    def drop(self, key: str) -> None:
        self._placed.pop(key, None)
        self._sent.discard(key)

    def heartbeat(self) -> None:
        for key in self._sent:
            del self._placed[key]
        self._sent.clear()

    @property
    def total(self) -> int:
        return sum(self._placed.values())

    def __len__(self) -> int:
        return len(self._placed)
