"""Ends a stretch of a task's work from outside."""

from __future__ import annotations

import asyncio
from types import TracebackType

from tandem.errors import TandemError


class Interrupt:
    """Around what a task does: whatever it waits for then, `throw` ends it with an error, as asyncio.timeout does."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        # Set inside the stretch.
        self._task: asyncio.Task[object] | None = None
        self._cancels_before = 0
        self._error: TandemError | None = None

    def throw(self, error: TandemError) -> None:
        """From any thread. Only the first error counts, and none outside of the stretch."""
        self._loop.call_soon_threadsafe(self._throw, error)

    def _throw(self, error: TandemError) -> None:
        if self._task is not None and self._error is None:
            self._error = error
            self._task.cancel()

    def __enter__(self) -> Interrupt:
        self._task = asyncio.current_task()
        assert self._task is not None, "in a task"
        self._cancels_before = self._task.cancelling()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        # Whoever may throw still holds this: it keeps neither the task nor, by a traceback, its frames.
        task, self._task = self._task, None
        thrown, self._error = self._error, None
        assert task is not None
        if thrown is None:
            return
        others = task.uncancel() > self._cancels_before
        if isinstance(error, asyncio.CancelledError) and not others:
            raise thrown from None
