"""Blocks behind a fence: free when their writer is known to be out or the worker ends, and not where nobody knows."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from kv_rig import until

from kv_transfer.ends.one_sided import Fences


class Fenced:
    def __init__(self) -> None:
        self.fences = Fences()
        self.freed = False
        self._writer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        blocks = ExitStack()
        blocks.enter_context(self._in_use())
        self.fences.keep(blocks, self._writer_is_out())

    async def _writer_is_out(self) -> None:
        await self._writer

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """As a reservation's blocks: in use no more when this is left, or collected."""
        try:
            yield
        finally:
            self.freed = True

    def end(self, error: Exception | None = None) -> None:
        if error is None:
            self._writer.set_result(None)
        else:
            self._writer.set_exception(error)


async def test_blocks_are_freed_when_the_writer_is_out() -> None:
    fenced = Fenced()
    await asyncio.sleep(0)
    assert not fenced.freed
    fenced.end()
    await until(lambda: fenced.freed)


async def test_blocks_stay_where_nobody_knows(caplog: pytest.LogCaptureFixture) -> None:
    fenced = Fenced()
    fenced.end(ZeroDivisionError("of a bug"))
    await until(lambda: "stay in quarantine" in caplog.text)
    gc.collect()
    assert not fenced.freed


@pytest.mark.parametrize("begun", [False, True])
async def test_a_worker_that_ends_gives_its_blocks_to_nobody(begun: bool) -> None:
    fenced = Fenced()
    if begun:
        await asyncio.sleep(0)
    fenced.fences.close()
    await until(lambda: fenced.freed)
