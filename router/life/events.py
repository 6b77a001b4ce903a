"""The events of one request, from its choices to its door."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from tandem.types import Event


class EventStream:
    """What choices offer, taken one by one.

    A choice's tokens wait in its inbox, and become an event when the door takes it: so a slow client slows its request
    down, not the workers, and what came meanwhile goes in one event.
    """

    def __init__(self) -> None:
        self._offers: deque[Callable[[], Event | None]] = deque()
        self._news, self._drained = asyncio.Event(), asyncio.Event()
        self._closed = False

    def offer(self, take: Callable[[], Event | None]) -> None:
        """take is called when its turn has come; None: there is nothing after all."""
        self._offers.append(take)
        self._news.set()

    def put(self, event: Event) -> None:
        self.offer(lambda: event)

    def close(self) -> None:
        """Nothing is given any more."""
        self._closed = True
        self._news.set()

    async def next(self) -> Event | None:
        """Asking for it says that the one before has been handed over. None once the stream is closed."""
        while not self._closed:
            if self._offers:
                event = self._offers.popleft()()
                if event is not None:
                    return event
            else:
                self._drained.set()
                self._news.clear()
                await self._news.wait()
        return None

    async def drained(self) -> None:
        """Returns when all that was offered has been handed over."""
        self._drained.clear()
        await self._drained.wait()
