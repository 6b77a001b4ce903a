"""Copies run in threads. A thread cannot be stopped, so whoever started one waits for it, cancelled or not."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

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
