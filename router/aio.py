"""What asyncio leaves to be said by its users."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any


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
