"""The one thread that makes a process end's calls of NIXL, and moves UCX along for as long as anybody needs it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import ParamSpec, TypeVar

from kv_transfer.ends.tasks import end
from tandem.errors import TransferFailed

P = ParamSpec("P")
T = TypeVar("T")

# Polls in a turn, before the thread sees to other calls. When nothing moved (a poll takes 1 µs) it rests.
_POLLS = 64
_NOTHING_MOVED_S, _REST_S = 0.0003, 0.0002


class Driver:
    def __init__(self, name: str, poll: Callable[[], bool]) -> None:
        """poll: moves what waits to be moved, in the thread; false when nobody needs that any more."""
        self._poll = poll
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        # Whether a turn is due; read and written by the thread alone.
        self._turning = False

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs in the thread. A cancel does not wait for it. Raises TransferFailed when the driver is closed."""
        return await asyncio.wrap_future(self.submit(function, *args, **kwargs))

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """As call, without waiting, from any thread."""
        try:
            return self._thread.submit(function, *args, **kwargs)
        except RuntimeError:
            raise TransferFailed("the transport was closed in mid-transfer") from None

    def wake(self) -> None:
        """In the thread: polls from now on until nobody needs it."""
        if not self._turning:
            self._turning = True
            self._submit_turn()

    async def aclose(self, last: Callable[[], None]) -> None:
        """What was submitted before is done, and then `last`. Twice is once."""
        with suppress(TransferFailed):
            self.submit(last)
        await end(self._thread)

    def _turn(self) -> None:
        started = time.monotonic()
        for _ in range(_POLLS):
            if not self._poll():
                self._turning = False
                return
        if time.monotonic() - started < _NOTHING_MOVED_S:
            time.sleep(_REST_S)
        self._submit_turn()

    def _submit_turn(self) -> None:
        try:
            self._thread.submit(self._turn)
        except RuntimeError:  # closed: nobody waits any more
            self._turning = False
