"""What carriers have in common whose sender writes into the reserved blocks itself.

Their receiving ends name the blocks, of all positions that travel and of no others, and verify what they are told was
written where it lies.
"""

from __future__ import annotations

import asyncio
import logging
import struct
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import ExitStack
from functools import partial
from typing import ClassVar, TypeVar

import numpy as np

from kv_transfer.base import IncomingTransfer
from kv_transfer.ends.link import Call, CarrierLink
from kv_transfer.ends.receiver import Intake
from kv_transfer.ends.tasks import Interrupt, note_failure
from kv_transfer.frames.cells import Cells, Native
from kv_transfer.frames.codec import CorruptFrame
from kv_transfer.frames.layout import blocks_of
from kv_transfer.frames.messages import BlockList, Data, Done, KVMessage, Open, Written
from tandem.errors import Refused, TransferFailed

log = logging.getLogger(__name__)

M = TypeVar("M", bound=KVMessage)


class WritingLink(CarrierLink, ABC):
    """Asks for the blocks as soon as the transfer opens, while prefill computes."""

    # Writes keep two threads busy.
    ahead = 2
    # What the receiver may say before it is done.
    answers: ClassVar[tuple[type[KVMessage], ...]]

    def __init__(self, call: Call) -> None:
        self._said: asyncio.Queue[tuple[KVMessage, memoryview] | None] = asyncio.Queue()
        # The receiver's block table, as far as it may be written; the rest is never looked at.
        self._blocks: Sequence[int] = ()
        super().__init__(call)
        self._access = asyncio.create_task(self._get_access()) if call.target.travelling else None
        if self._access is not None:
            self._access.add_done_callback(note_failure)

    @abstractmethod
    async def _get_access(self) -> None:
        """Returns when the blocks may be written."""

    async def ready(self) -> None:
        if self._access is not None:
            await self._access

    def close(self) -> None:
        super().close()
        if self._access is not None:
            self._access.cancel()

    def _take_blocks(self, named: BlockList, ids: memoryview) -> list[int]:
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

    def _note(self, message: KVMessage, payload: memoryview) -> None:
        if not isinstance(message, self.answers) or self._said.qsize() > 1:
            super()._note(message, payload)
        self._said.put_nowait((message, payload))

    def _on_end(self, answer: asyncio.Task[Done]) -> None:
        super()._on_end(answer)
        self._said.put_nowait(None)


class WrittenIntake(Intake, ABC):
    """Payloads are in the pool before their frames come."""

    kind = Written

    async def begin(
        self, incoming: IncomingTransfer, opening: Open, frames: AsyncIterator[bytes], interrupt: Interrupt
    ) -> None:
        """See Intake. A transfer of nothing asks for nothing."""
        if opening.wire_dtype != Native.name:
            raise Refused(f"what is written into the pool is native KV, not {opening.wire_dtype[:20]}")
        if opening.tokens:
            await self._give_access(incoming, opening, frames, interrupt)

    @abstractmethod
    async def _give_access(
        self, incoming: IncomingTransfer, opening: Open, frames: AsyncIterator[bytes], interrupt: Interrupt
    ) -> None:
        """Returns when the sender may write. It holds the transfer's blocks in use from then on."""

    def store(self, cells: Cells, wire: Native, data: Data, payload: memoryview) -> None:
        """See Intake. Nothing moves."""
        if cells.pieces().checksum() != data.checksum:
            raise CorruptFrame(f"the payload of KV frame {data.sequence} fails its checksum")


def block_ids(incoming: IncomingTransfer, tokens: range) -> tuple[list[int], bytes]:
    """The blocks that these positions lie in, and the same as a payload."""
    blocks = [incoming.blocks[entry] for entry in blocks_of(tokens, incoming.pool.shape[3])]
    return blocks, struct.pack(f">{len(blocks)}I", *blocks)


class Fences:
    """Blocks whose reservation is over while the sender may still write into them.

    Each fence holds those of one transfer until its writer is known to write no more.
    """

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
