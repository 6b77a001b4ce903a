"""What asyncio leaves to be said by its users."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from tandem.errors import DeadlineExceeded


async def first_of(*coroutines: Coroutine[Any, Any, None]) -> None:
    """Runs all until the first ends, ends the others, and returns or raises as the first did."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


@contextmanager
def first_error() -> Iterator[None]:
    """Around a TaskGroup: raises the error that ended the group instead of an exception group."""
    try:
        yield
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None


@asynccontextmanager
async def ends_after(seconds: float) -> AsyncIterator[float]:
    """Yields the deadline on the event loop's clock. Raises DeadlineExceeded when it passes inside."""
    scope = asyncio.timeout(seconds)
    try:
        async with scope:
            yield asyncio.get_running_loop().time() + seconds
    except TimeoutError:
        if not scope.expired():
            raise
        raise DeadlineExceeded(f"the request's deadline of {seconds:.3g} s passed") from None
