"""How work is waited for, and ended from outside.

Copies run in threads. A thread cannot be stopped, so whoever started one waits for it, cancelled or not.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

from tandem.errors import TandemError

T = TypeVar("T")

# Copies are memory-bound: two keep a link busy, more would only take cores from the engine.
THREADS = 2


def copy_threads(name: str) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS, thread_name_prefix=name)


async def end(threads: ThreadPoolExecutor) -> None:
    """They take no more work. Returns when what they have is done, and does not hold up the event loop meanwhile."""
    threads.shutdown(wait=False)
    await asyncio.to_thread(threads.shutdown)


async def finish(work: asyncio.Future[T]) -> T:
    """The result of work in a thread. A cancel is raised only after the thread is done with its memory."""
    cancelled: asyncio.CancelledError | None = None
    while not work.done():
        try:
            await asyncio.wait([work])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        work.exception()  # seen; the cancel matters more
        raise cancelled
    return work.result()


def note_failure(task: asyncio.Future[Any]) -> None:
    """For what is done: its failure is raised in whoever waits for it, and perhaps nobody does."""
    if not task.cancelled():
        task.exception()


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
