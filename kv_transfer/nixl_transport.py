"""Transport `nixl`: the sender writes into the reserved blocks, by NIXL: over RDMA, TCP, to and from GPUs.

What moves is the pool's own bytes, whatever `worker.wire_dtype` says, from the blocks of one pool to those of the other
without a copy between. Everything else is as in `grpc`: the order of frames, every check, deadline, cancel.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import grpc

from kv_transfer.base import Source, Target
from kv_transfer.cells import slot_spans
from kv_transfer.codec import encode
from kv_transfer.layout import KVLayout
from kv_transfer.messages import Data, Done, Lent, Released, Writer, Written
from kv_transfer.nixl_agent import KINDS, pieces_of
from kv_transfer.nixl_writer import NixlWriter, Order
from kv_transfer.push import PushLink, PushTransport
from kv_transfer.runs import Runs
from kv_transfer.service import RELEASE, SERVICE
from kv_transfer.threads import finish
from kv_transfer.wire_dtype import Native
from kv_transfer.writing import WritingLink
from tandem.config import TandemConfig
from tandem.errors import TransferFailed

log = logging.getLogger(__name__)

# More would leave one of the copy threads idle for longer.
FRAME_BYTES = 4 << 20
# A write whose transfer has failed has this long to end before its connection is cut.
_GRACE_S = 1.0
# The receiver's own word is worth waiting for when a write fails: it may have ended the transfer.
_WORD_S = 1.0
_RELEASE_TIMEOUT_S = 1.0


class NixlTransport(PushTransport):
    name = "nixl"

    def __init__(self, config: TandemConfig) -> None:
        super().__init__(min(config.worker.object_bytes, FRAME_BYTES), Native.name)
        self._writer = NixlWriter(config.worker.nixl_devices)

    async def aclose(self) -> None:
        """See Transport."""
        await super().aclose()
        await self._writer.aclose()

    def _link(self, call: Any, source: Source, target: Target) -> PushLink:
        return _NixlLink(call, source, target, self._writer, self._release)

    async def _release(self, target: Target) -> None:
        """Tells the receiver that nothing is written any more; one that does not hear it finds out by itself."""
        with suppress(grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.CancelledError):
            async with self._channels.use(target.address) as channel:
                released = encode(Released(target.reservation_id))
                release: Any = channel.unary_unary(f"/{SERVICE}/{RELEASE}", None, None)
                await release(released, timeout=_RELEASE_TIMEOUT_S)


class _NixlLink(WritingLink):
    """Frames say that writes have ended, in order; up to two more are under way."""

    def __init__(
        self,
        call: Any,
        source: Source,
        target: Target,
        writer: NixlWriter,
        release: Callable[[Target], Awaitable[None]],
    ) -> None:
        self._writer = writer
        self._release = release
        # Set when the receiver has been asked for blocks, when it lent them, and when it knows that nobody writes.
        self._asked = False
        self._lent: Lent | None = None
        self._settled = False
        # By sequence; until its frame leaves.
        self._writes: dict[int, Future[None]] = {}
        super().__init__(call, source, target)

    async def write(self, frame: bytes) -> None:
        """See Link. The opening is followed by who writes; a seal or an abandon follows the last write."""
        for write in list(self._writes.values()):
            await self._end_of(write)
        await super().write(frame)
        if self._access is not None and not self._asked:
            self._asked = True
            await super().write(encode(Writer(self._writer.id)))

    async def _get_access(self) -> None:
        lent, payload = await self._next(Lent)
        if lent.memory not in KINDS:
            raise TransferFailed(f"the worker at {self._peer} has its pool in memory of an unknown kind")
        self._take_blocks(lent, payload[lent.metadata_bytes :])
        self._lent = lent
        await self._writer.meet(self, self._source.pool, lent, bytes(payload[: lent.metadata_bytes]))

    def pack(self, sequence: int, layers: range, tokens: range, payload: Runs) -> tuple[Data, bytes]:
        """See Link. The payload is on its way while its checksum is taken."""
        self._writes[sequence] = self._writer.write(self._order(layers, tokens))
        data = Written.of_ranges(sequence, layers, tokens, payload.nbytes, payload.checksum())
        return data, encode(data)

    def _order(self, layers: range, tokens: range) -> Order:
        lent, pool, layout = self._lent, self._source.pool, self._source.layout
        assert lent is not None, "the blocks were lent before"
        row_bytes = layout.payload_bytes(1, 1) // 2
        near_spans = list(slot_spans(self._source.blocks, tokens, layout.block_size))
        far_spans = list(slot_spans(self._blocks, tokens, layout.block_size))
        far_shape = _shape(layout, lent.pool_blocks)
        near_device = max(0, pool.get_device())
        near = pieces_of(pool.data_ptr(), pool.shape, row_bytes, near_spans, layers, near_device)
        far = pieces_of(lent.address, far_shape, row_bytes, far_spans, layers, lent.device)
        return Order(lent.agent_id, near, pool.device.type, far, lent.memory)

    async def carry(self, data: Data, packed: bytes) -> None:
        """See Link. The frame leaves when the payload is in the receiver's blocks."""
        await self._end_of(self._writes[data.sequence])
        del self._writes[data.sequence]
        await super().write(packed)

    async def _end_of(self, write: Future[None]) -> None:
        """Raises what the receiver ended the call with, or else why the write failed."""
        ended = asyncio.wrap_future(write)
        ended.add_done_callback(_see)
        either: set[asyncio.Future[Any]] = {ended, self._answer}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if ended.done() and ended.exception() is None:
            return
        await asyncio.wait({self._answer}, timeout=_WORD_S)
        if self._answer.done():
            with self._own_cancels_only():
                await self._answer
            raise TransferFailed(f"the worker at {self._peer} ended the transfer early")
        await ended

    async def finish(self) -> Done:
        """See Link."""
        done = await super().finish()
        self._settled = True
        return done

    async def gone(self) -> None:
        """See PushLink. No write reads the source any more, and the receiver knows, if it is well."""
        await finish(asyncio.create_task(self._leave()))

    async def _leave(self) -> None:
        clean = await self._drain()
        if self._lent is not None:
            self._writer.part(self, self._lent.agent_id)
        if clean and self._asked and not self._settled:
            await self._release(self._target)

    async def _drain(self) -> bool:
        """Whether all writes ended well: of one that did not, something may lie in a buffer of the receiver's."""
        writes = [asyncio.wrap_future(write) for write in self._writes.values()]
        if not writes:
            return True
        _, late = await asyncio.wait(writes, timeout=_GRACE_S)
        if late and self._lent is not None:
            log.warning("the worker at %s takes no KV: its connection by NIXL is cut", self._peer)
            await self._writer.cut_off(self._lent.agent_id)
        ends = await asyncio.gather(*writes, return_exceptions=True)
        return not any(isinstance(end, BaseException) for end in ends)


def _shape(layout: KVLayout, pool_blocks: int) -> tuple[int, int, int, int]:
    return (layout.num_layers, 2, pool_blocks, layout.block_size)


def _see(write: asyncio.Future[None]) -> None:
    """A failure is of interest only as long as the transfer lasts."""
    if not write.cancelled():
        write.exception()
