"""What asyncio leaves to be said by its users."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Self

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


class Scope:
    """A part of a task that others may end.

        open ──its body ends──▶ left
          ├──────end──────────▶ its body is cancelled ──▶ left
          └──────fail─────────▶ its body is cancelled ──▶ left, raising the error

    The first call counts, and its error before one that the body raises because of it.
    """

    def __init__(self) -> None:
        self._timeout = asyncio.timeout(None)
        self._open = False
        self._error: Exception | None = None

    def end(self, within_s: float = 0.0) -> None:
        """within_s: the body has so long to end by itself."""
        if self._open:
            self._open = False
            self._timeout.reschedule(asyncio.get_running_loop().time() + within_s)

    def fail(self, error: Exception) -> None:
        if self._open:
            self._error = error
            self.end()

    async def __aenter__(self) -> Self:
        await self._timeout.__aenter__()
        self._open = True
        return self

    async def __aexit__(self, *raised: Any) -> bool:
        self._open, ended = False, False
        try:
            await self._timeout.__aexit__(*raised)
        except TimeoutError:
            ended = True
        if self._error is not None and (ended or isinstance(raised[1], Exception)):
            raise self._error from None
        return ended
