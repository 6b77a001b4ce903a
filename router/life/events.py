"""The events of one request, from its choices to its door, and when a choice may offer what it has."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from tandem.types import Event

# A message to a client costs the router about 50 µs, most of it inside gRPC, however few tokens are in it; so many a
# second take a fifth of a core.
RATE = 4000
# After a pause, so many at once: the whole step of a usual batch, in less than 4 ms.
BURST = 64
INTERVAL_S = 0.001


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


class EmitPacer:
    """RATE choices a second hand over what they have, whoever has waited longest first.

    With few tokens about, a turn comes at once. With many, the tokens of several steps go in one message: that keeps a
    router that is short of time from falling behind. Those who waited get one turn in each pass of the event loop: a
    new request takes about ten passes up to its first token, and so each of them is short.
    """

    def __init__(self) -> None:
        self._queue: deque[Callable[[], None]] = deque()
        # Turns that may be had now, as of a moment on the event loop's clock.
        self._credit, self._at_s = float(BURST), 0.0
        # While somebody waits.
        self._next_turn: asyncio.Handle | None = None

    def ask(self, take: Callable[[], None]) -> None:
        """take is called when the turn has come: now, if there is one and nobody waits for it.

        Whoever waits must not ask again.
        """
        self._queue.append(take)
        if self._next_turn is None:
            self._give_one()

    def _give_one(self) -> None:
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        self._credit = min(BURST, self._credit + (now_s - self._at_s) * RATE)
        self._at_s = now_s
        if self._credit < 1:
            self._next_turn = loop.call_later(INTERVAL_S, self._give_one)
            return
        self._credit -= 1
        take = self._queue.popleft()
        self._next_turn = loop.call_soon(self._give_one) if self._queue else None
        take()
