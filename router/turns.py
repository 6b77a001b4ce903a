"""When a choice may hand decoded tokens to its client."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

# A message to a client costs the router about 50 µs, most of it inside gRPC, however many tokens are in it; so many
# of them take less than half of a core.
TURNS, INTERVAL_S = 16, 0.002


class Turns:
    """At most TURNS choices in every INTERVAL_S hand over what they have, whoever has waited longest first.

    With few tokens about, a turn comes at once. With many, the tokens of several steps go in one message, which is what
    keeps a router that is short of time from falling behind, and the event loop is never held by all streams at once:
    new requests pass between the turns.
    """

    def __init__(self) -> None:
        self._queue: deque[Callable[[], None]] = deque()
        self._left = TURNS
        self._timer: asyncio.TimerHandle | None = None

    def ask(self, take: Callable[[], None]) -> None:
        """take is called when the turn has come: now, if one is left. Whoever waits must not ask again."""
        if self._left:
            self._left -= 1
            take()
        else:
            self._queue.append(take)
        if self._timer is None:
            self._start()

    def _start(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(INTERVAL_S, self._next)

    def _next(self) -> None:
        turns = min(TURNS, len(self._queue))
        self._left, self._timer = TURNS - turns, None
        for _ in range(turns):
            self._queue.popleft()()
        if turns:
            self._start()
