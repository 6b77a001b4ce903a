"""When a choice may hand decoded tokens to its client."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

# A message to a client costs the router about 50 µs, most of it inside gRPC, however few tokens are in it; so many a
# second take a fifth of a core.
RATE = 4000
# After a pause, so many at once: the whole step of a usual batch, in less than 4 ms.
BURST = 64
INTERVAL_S = 0.001


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
