"""Carrier `shm`: the sender writes into the reserved blocks, in memory that both processes have.

What moves is the pool's own bytes, whatever `worker.wire_dtype` says.
Everything else is as in `grpc`: the order of frames, every check, deadline, cancel. Two workers of one host can use it.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor

from kv_transfer.carriers.shm.intake import MappedIntake
from kv_transfer.carriers.shm.memory import SharedMemory, host_domain, shared_memory
from kv_transfer.carriers.shm.messages import Granted, Locked, Mapped
from kv_transfer.carriers.shm.peers import Peers
from kv_transfer.ends.carrier import Carrier, PoolMemory
from kv_transfer.ends.link import Call
from kv_transfer.ends.one_sided import Fences, WritingLink
from kv_transfer.ends.receiver import Intake
from kv_transfer.frames.cells import Cells, Native
from kv_transfer.frames.codec import encode
from kv_transfer.frames.messages import Data, Written
from kv_transfer.frames.runs import Runs
from tandem.config import WorkerConfig
from tandem.errors import TransferFailed
from tandem.v1 import registry_pb2


class ShmCarrier(Carrier):
    """Between workers of one host; the receiver's pool is memory of the cpu."""

    name = "shm"
    method = "PushMapped"

    def __init__(self, worker: WorkerConfig, memory: SharedMemory) -> None:
        """memory: of this process's own pool; not used in one that only sends."""
        self.frame_bytes, self.wire_dtype = worker.object_bytes, Native.name
        self._memory = memory
        self._peers = Peers()
        self._fences = Fences()

    @classmethod
    def make(cls, worker: WorkerConfig, memory: PoolMemory) -> Self | None:
        own = shared_memory()
        if own is None or (memory.receives and memory.device != "cpu"):
            return None
        if memory.receives:
            memory.allocate = own.allocate
        return cls(worker, own)

    def announcement(self) -> registry_pb2.Transport:
        return registry_pb2.Transport(name=self.name, domain=host_domain(), rank=30)

    def link(self, call: Call) -> WritingLink:
        return _ShmLink(call, self._peers)

    def intake(self, context: Any) -> Intake:
        return MappedIntake(self._memory, self._fences, context)

    async def aclose(self) -> None:
        self._fences.close()
        self._peers.close()


class _ShmLink(WritingLink):
    """The lock of the reservation's blocks is held from before the grant until no thread writes any more."""

    # What is made is where it belongs: nothing of it is held here.
    ahead = 8
    answers = (Mapped, Granted)

    def __init__(self, call: Call, peers: Peers) -> None:
        self._peers = peers
        # Holds the peer's memory and the lock.
        self._held = ExitStack()
        self._pool: Tensor | None = None
        super().__init__(call)

    def pack(self, sequence: int, layers: range, tokens: range, payload: Runs) -> tuple[Data, bytes]:
        """See CarrierLink. The payload is where it belongs on return."""
        assert self._pool is not None, "the blocks were granted before"
        crc = Cells(self._pool, self._blocks, layers, tokens).copy_from(payload)
        data = Written.of_ranges(sequence, layers, tokens, payload.nbytes, crc)
        return data, encode(data)

    def rest(self) -> None:
        """See CarrierLink. Lets go of the blocks."""
        self._pool = None
        self._held.close()

    async def _get_access(self) -> None:
        mapped, payload = await self._next(Mapped)
        layout = self._source.layout
        if mapped.memory_bytes != layout.payload_bytes(layout.num_layers, mapped.pool_blocks * layout.block_size):
            raise TransferFailed(f"the worker at {self._peer} maps another pool than this KV's")
        blocks = self._take_blocks(mapped, payload)
        memory, key = self._held.enter_context(self._peers.use(mapped)), blocks[0]
        memory.lock(key)
        self._held.callback(memory.unlock, key)
        await self.write(encode(Locked()))
        await self._next(Granted)
        self._pool = layout.pool_in(torch.from_numpy(memory.bytes), mapped.pool_blocks)
