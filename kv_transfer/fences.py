"""Blocks whose reservation is over while the sender may still write into them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import ExitStack
from functools import partial

log = logging.getLogger(__name__)


class Fences:
    """Each holds the blocks of one transfer until its writer is known to write no more."""

    def __init__(self) -> None:
        self._waiting: set[asyncio.Task[None]] = set()
        # Never closed; one that nobody has would be collected, and its blocks freed.
        self._kept: list[ExitStack] = []

    def keep(self, blocks: ExitStack, writer_is_out: Coroutine[None, None, None]) -> None:
        """blocks: closed when the coroutine has returned. Where it raises, they stay in use as long as the worker."""
        fence = asyncio.create_task(writer_is_out)
        self._waiting.add(fence)
        # A task that is cancelled before it began runs no line of its own.
        fence.add_done_callback(partial(self._on_end, blocks))

    def close(self) -> None:
        """The worker ends, and its pool with it: nobody gets these blocks any more."""
        for fence in self._waiting:
            fence.cancel()

    def _on_end(self, blocks: ExitStack, fence: asyncio.Task[None]) -> None:
        self._waiting.discard(fence)
        failure = None if fence.cancelled() else fence.exception()
        if failure is None:
            blocks.close()
        else:
            self._kept.append(blocks)
            log.error("a bug: blocks stay in quarantine, for nobody knows who writes into them", exc_info=failure)
