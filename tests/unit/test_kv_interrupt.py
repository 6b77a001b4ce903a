"""Interrupts end what a task waits for, and nothing else."""

from __future__ import annotations

import asyncio
import threading

import pytest
from kv_rig import until

from kv_transfer.ends.tasks import Interrupt
from tandem.errors import TransferFailed


class Waiting:
    """A task that waits inside of an interrupt's stretch, then outside, each until it is told to go on."""

    def __init__(self) -> None:
        self.inside, self.outside = asyncio.Event(), asyncio.Event()
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> str:
        try:
            with Interrupt() as self.interrupt:
                await self.inside.wait()
        except TransferFailed as error:
            await self.outside.wait()
            return error.message
        await self.outside.wait()
        return "whole"


async def test_it_raises_the_first_error_from_any_thread() -> None:
    waiting = Waiting()
    await asyncio.sleep(0)
    for words in ("first", "second"):
        thread = threading.Thread(target=waiting.interrupt.throw, args=(TransferFailed(words),))
        thread.start()
        thread.join()
    waiting.outside.set()
    assert await waiting.task == "first"
    assert waiting.task.cancelling() == 0


async def test_nothing_happens_outside_of_the_stretch() -> None:
    waiting = Waiting()
    waiting.inside.set()
    await asyncio.sleep(0)
    waiting.interrupt.throw(TransferFailed("late"))
    await asyncio.sleep(0)
    waiting.outside.set()
    assert await waiting.task == "whole"


@pytest.mark.parametrize("first", ["cancel", "throw"])
async def test_a_cancel_beside_it_stays_a_cancel(first: str) -> None:
    waiting = Waiting()
    await asyncio.sleep(0)
    if first == "throw":
        waiting.interrupt.throw(TransferFailed("too"))
    asyncio.get_running_loop().call_soon(waiting.task.cancel)  # in the same pass of the loop as the errors
    waiting.interrupt.throw(TransferFailed("too"))
    await until(waiting.task.done)
    assert waiting.task.cancelled()
