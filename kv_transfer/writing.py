"""What sending ends have in common that write into the reserved blocks themselves."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from kv_transfer.base import Source, Target
from kv_transfer.layout import blocks_of
from kv_transfer.messages import Data, Done, Granted, Lent, Mapped, Message
from kv_transfer.push import PushLink
from tandem.errors import TransferFailed

M = TypeVar("M", bound=Message)


class WritingLink(PushLink):
    """Asks for the blocks as soon as the transfer opens, while prefill computes."""

    # Writes keep two threads busy.
    ahead = 2

    def __init__(self, call: Any, source: Source, target: Target) -> None:
        self._source = source
        self._target = target
        self._said: asyncio.Queue[tuple[Message, memoryview] | None] = asyncio.Queue()
        # The receiver's block table, as far as it may be written; the rest is never looked at.
        self._blocks: Sequence[int] = ()
        super().__init__(call, target.address)
        self._access = asyncio.create_task(self._get_access()) if target.travelling else None
        if self._access is not None:
            self._access.add_done_callback(_see)

    @abstractmethod
    async def _get_access(self) -> None:
        """Returns when the blocks may be written."""

    async def ready(self) -> None:
        """See Link."""
        if self._access is not None:
            await self._access

    async def carry(self, data: Data, packed: bytes) -> None:
        """See Link."""
        await self.write(packed)

    def close(self) -> None:
        """See PushLink."""
        super().close()
        if self._access is not None:
            self._access.cancel()

    def _take_blocks(self, named: Mapped | Lent, ids: memoryview) -> list[int]:
        """Those that may be written. Raises TransferFailed unless they are what this side computes."""
        block_size, travelling = self._source.layout.block_size, self._target.travelling
        blocks: list[int] = np.frombuffer(ids, dtype=">u4").tolist()
        if len(blocks) != len(blocks_of(travelling, block_size)):
            raise TransferFailed(f"the worker at {self._peer} names other blocks than these KV take")
        if max(blocks) >= named.pool_blocks:
            raise TransferFailed(f"the worker at {self._peer} names blocks outside its pool")
        # Positions before the first that travels are in blocks that were not named.
        self._blocks = (*[-1] * (travelling.start // block_size), *blocks)
        return blocks

    async def _next(self, kind: type[M]) -> tuple[M, memoryview]:
        """The receiver's next words. Raises what it ended the call with."""
        said = await self._said.get()
        if said is None:
            await self._answer
            raise TransferFailed(f"the worker at {self._peer} ended the transfer before it began")
        message, payload = said
        if not isinstance(message, kind):
            raise TransferFailed(f"the worker at {self._peer} said {type(message).__name__} out of turn")
        return message, payload

    def _note(self, message: Message, payload: memoryview) -> None:
        if not isinstance(message, Mapped | Granted | Lent) or self._said.qsize() > 1:
            super()._note(message, payload)
        self._said.put_nowait((message, payload))

    def _on_end(self, answer: asyncio.Task[Done]) -> None:
        super()._on_end(answer)
        self._said.put_nowait(None)


def _see(access: asyncio.Task[None]) -> None:
    """A failure is of interest to those who wait for access, and perhaps nobody does."""
    if not access.cancelled():
        access.exception()
