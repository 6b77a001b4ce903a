from __future__ import annotations

import asyncio

import pytest

from router.aio import Scope
from tandem.errors import TransferFailed, Unavailable, WorkerLost


async def body(scope: Scope, reached: list[str], wait_s: float = 5.0) -> None:
    async with scope:
        reached.append("in")
        await asyncio.sleep(wait_s)
        reached.append("through")
    reached.append("out")


async def test_a_scope_is_ended_from_outside_its_task() -> None:
    scope, reached = Scope(), list[str]()
    task = asyncio.create_task(body(scope, reached))
    await asyncio.sleep(0)
    scope.end()
    await asyncio.wait_for(task, 1)
    assert reached == ["in", "out"]
    assert task.cancelling() == 0
    scope.end()
    scope.fail(Unavailable("too late"))


async def test_its_body_may_end_in_time_by_itself() -> None:
    scope, reached = Scope(), list[str]()
    task = asyncio.create_task(body(scope, reached, wait_s=0.01))
    await asyncio.sleep(0)
    scope.end(within_s=5.0)
    await asyncio.wait_for(task, 1)
    assert reached == ["in", "through", "out"]


async def test_the_first_error_counts() -> None:
    scope, reached = Scope(), list[str]()
    task = asyncio.create_task(body(scope, reached))
    await asyncio.sleep(0)
    scope.fail(WorkerLost("first"))
    scope.fail(Unavailable("second"))
    scope.end()
    with pytest.raises(WorkerLost, match="first"):
        await asyncio.wait_for(task, 1)
    assert reached == ["in"]


async def test_what_has_been_ended_fails_no_more() -> None:
    scope, reached = Scope(), list[str]()
    task = asyncio.create_task(body(scope, reached))
    await asyncio.sleep(0)
    scope.end(within_s=0.01)
    scope.fail(WorkerLost("nobody waits for it"))
    await asyncio.wait_for(task, 1)
    assert reached == ["in", "out"]


async def test_what_the_body_raises_because_of_it_does_not_hide_it() -> None:
    scope = Scope()

    async def breaks() -> None:
        async with scope:
            try:
                await asyncio.sleep(5)
            except asyncio.CancelledError:
                raise TransferFailed("a consequence") from None

    task = asyncio.create_task(breaks())
    await asyncio.sleep(0)
    scope.fail(WorkerLost("the cause"))
    with pytest.raises(WorkerLost, match="the cause"):
        await task


async def test_a_cancelled_task_stays_cancelled() -> None:
    scope, reached = Scope(), list[str]()
    task = asyncio.create_task(body(scope, reached))
    await asyncio.sleep(0)
    scope.fail(WorkerLost("at the same time"))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
