"""Carrier `nixl`: the sender writes into the reserved blocks, by NIXL: over RDMA, TCP, to and from GPUs.

What moves is the pool's own bytes, whatever `worker.wire_dtype` says, from the blocks of one pool to those of the other
without a copy between. Everything else is as in `grpc`: the order of frames, every check, deadline, cancel.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Self

import grpc

from kv_transfer.carriers.nixl.agent import KINDS, check_devices, pieces_of, reachable
from kv_transfer.carriers.nixl.intake import NixlIntake
from kv_transfer.carriers.nixl.messages import Lent, Released, WriterName
from kv_transfer.carriers.nixl.writer import NixlWriter
from kv_transfer.carriers.nixl.writer_agents import WriterAgents
from kv_transfer.ends.carrier import Carrier, PoolMemory
from kv_transfer.ends.link import SERVICE, Call
from kv_transfer.ends.one_sided import WritingLink
from kv_transfer.ends.receiver import Intake
from kv_transfer.ends.tasks import finish, note_failure
from kv_transfer.frames.cells import Native, slot_spans
from kv_transfer.frames.codec import decode, encode
from kv_transfer.frames.messages import Data, Done, Written
from kv_transfer.frames.runs import Runs
from tandem.config import WorkerConfig
from tandem.errors import TransferFailed
from tandem.v1 import registry_pb2

log = logging.getLogger(__name__)

# By this call a writer says that it writes no more.
RELEASE = "Release"
# More would leave one of the copy threads idle for longer.
FRAME_BYTES = 4 << 20
# A write whose transfer has failed has this long to end before its connection is cut.
_GRACE_S = 1.0
# The receiver's own word is worth waiting for when a write fails: it may have ended the transfer.
_WORD_S = 1.0
_RELEASE_TIMEOUT_S = 1.0


class NixlCarrier(Carrier):
    """Between workers whose configuration names network devices for it."""

    name = "nixl"
    method = "PushLent"

    def __init__(self, worker: WorkerConfig, device: str) -> None:
        """device: whose memory this process's pool is in, "cpu" or "cuda"."""
        self.frame_bytes, self.wire_dtype = min(worker.object_bytes, FRAME_BYTES), Native.name
        # The sending end, and the receiving one.
        self.writer = NixlWriter(worker.nixl_devices)
        self.agents = WriterAgents(worker.nixl_devices)
        self._devices = worker.nixl_devices
        self._device = device

    @classmethod
    def make(cls, worker: WorkerConfig, memory: PoolMemory) -> Self | None:
        if not worker.nixl_devices:
            return None
        check_devices(worker.nixl_devices)
        return cls(worker, memory.device)

    def announcement(self) -> registry_pb2.Transport:
        """See Carrier. From GPU to GPU it is the best; otherwise it is used where it is asked for."""
        rank = 20 if self._device == "cuda" else 0
        return registry_pb2.Transport(name=self.name, domain=reachable(self._devices), rank=rank)

    def link(self, call: Call) -> WritingLink:
        return _NixlLink(call, self.writer)

    def intake(self, context: Any) -> Intake:
        return NixlIntake(self.agents, context)

    def other_calls(self) -> Mapping[str, Callable[[bytes], bytes]]:
        return {RELEASE: self._on_release}

    async def aclose(self) -> None:
        await self.writer.aclose()
        await self.agents.aclose()

    def _on_release(self, request: bytes) -> bytes:
        message, _ = decode(request)
        if not isinstance(message, Released):
            raise TransferFailed("a release is a frame of kind released")
        self.agents.release(message.reservation_id)
        return b""


class _NixlLink(WritingLink):
    """Frames say that writes have ended, in order; up to two more are under way."""

    answers = (Lent,)

    def __init__(self, call: Call, writer: NixlWriter) -> None:
        self._writer = writer
        # Set when the receiver has been asked for blocks, when it lent them, and when it knows that nobody writes.
        self._asked = False
        self._lent: Lent | None = None
        self._settled = False
        # By sequence; until its frame leaves.
        self._writes: dict[int, Future[None]] = {}
        super().__init__(call)

    async def write(self, frame: bytes) -> None:
        """See CarrierLink. The opening is followed by who writes; a seal or an abandon follows the last write."""
        for write in list(self._writes.values()):
            await self._end_of(write)
        await super().write(frame)
        if self._access is not None and not self._asked:
            self._asked = True
            await super().write(encode(WriterName(self._writer.id)))

    async def _get_access(self) -> None:
        lent, payload = await self._next(Lent)
        if lent.memory not in KINDS:
            raise TransferFailed(f"the worker at {self._peer} has its pool in memory of an unknown kind")
        self._take_blocks(lent, payload[lent.metadata_bytes :])
        self._lent = lent
        await self._writer.connect(self, self._source.pool, lent, bytes(payload[: lent.metadata_bytes]))

    def pack(self, sequence: int, layers: range, tokens: range, payload: Runs) -> tuple[Data, bytes]:
        """See CarrierLink. The payload is on its way while its checksum is taken."""
        self._writes[sequence] = self._write_pieces(layers, tokens)
        data = Written.of_ranges(sequence, layers, tokens, payload.nbytes, payload.checksum())
        return data, encode(data)

    def _write_pieces(self, layers: range, tokens: range) -> Future[None]:
        lent, pool, layout = self._lent, self._source.pool, self._source.layout
        assert lent is not None, "the blocks were lent before"
        row_bytes = layout.payload_bytes(1, 1) // 2
        near_spans = list(slot_spans(self._source.blocks, tokens, layout.block_size))
        far_spans = list(slot_spans(self._blocks, tokens, layout.block_size))
        far_shape = (layout.num_layers, 2, lent.pool_blocks, layout.block_size)
        near_device = max(0, pool.get_device())
        near = pieces_of(pool.data_ptr(), pool.shape, row_bytes, near_spans, layers, near_device)
        far = pieces_of(lent.address, far_shape, row_bytes, far_spans, layers, lent.device)
        return self._writer.write(lent.agent_id, near, KINDS[pool.device.type], far, KINDS[lent.memory])

    async def carry(self, data: Data, packed: bytes) -> None:
        """See CarrierLink. The frame leaves when the payload is in the receiver's blocks."""
        await self._end_of(self._writes[data.sequence])
        del self._writes[data.sequence]
        await super().write(packed)

    async def _end_of(self, write: Future[None]) -> None:
        """Raises what the receiver ended the call with, or else why the write failed."""
        ended = asyncio.wrap_future(write)
        ended.add_done_callback(note_failure)
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
        done = await super().finish()
        self._settled = True
        return done

    async def gone(self) -> None:
        """See CarrierLink. No write reads the source any more, and the receiver knows, if it is well."""
        await finish(asyncio.create_task(self._leave()))

    async def _leave(self) -> None:
        clean = await self._drain()
        if self._lent is not None:
            self._writer.leave(self, self._lent.agent_id)
        if not clean or not self._asked or self._settled:
            return
        # Nothing is written any more; a receiver that does not hear it finds out by itself.
        with suppress(grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.CancelledError):
            release: Any = self._channel.unary_unary(f"/{SERVICE}/{RELEASE}", None, None)
            await release(encode(Released(self._target.reservation_id)), timeout=_RELEASE_TIMEOUT_S)

    async def _drain(self) -> bool:
        """Whether all writes ended well: of one that did not, something may lie in a buffer of the receiver's."""
        writes = [asyncio.wrap_future(write) for write in self._writes.values()]
        if not writes:
            return True
        _, late = await asyncio.wait(writes, timeout=_GRACE_S)
        if late and self._lent is not None:
            log.warning("the worker at %s takes no KV: its connection by NIXL is cut", self._peer)
            await self._writer.disconnect(self._lent.agent_id)
        ends = await asyncio.gather(*writes, return_exceptions=True)
        return not any(isinstance(end, BaseException) for end in ends)
