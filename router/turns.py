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


class Turns:
    """RATE choices a second hand over what they have, whoever has waited longest first.

    With few tokens about, a turn comes at once. With many, the tokens of several steps go in one message: that keeps a
    router that is short of time from falling behind, and its event loop from being held by all streams at once, so that
    new requests pass between the turns.
    """

    def __init__(self) -> None:
        self._queue: deque[Callable[[], None]] = deque()
        # Turns that may be had now, as of a moment on the event loop's clock.
        self._credit, self._at_s = float(BURST), 0.0
        self._timer: asyncio.TimerHandle | None = None

    def ask(self, take: Callable[[], None]) -> None:
        """take is called when the turn has come: now, if there is one. Whoever waits must not ask again."""
        self._queue.append(take)
        if self._timer is None:
            self._next()

    def _next(self) -> None:
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        self._credit = min(BURST, self._credit + (now_s - self._at_s) * RATE)
        self._at_s = now_s
        turns = min(int(self._credit), len(self._queue))
        self._credit -= turns
        self._timer = loop.call_later(INTERVAL_S, self._next) if len(self._queue) > turns else None
        for _ in range(turns):
            self._queue.popleft()()
