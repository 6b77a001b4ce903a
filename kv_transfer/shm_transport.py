"""Transport `shm`: the sender writes into the reserved blocks, in memory that both processes have.

What moves is the pool's own bytes, whatever `worker.wire_dtype` says.
Everything else is as in `grpc`: the order of frames, every check, deadline, cancel. Two workers of one host can use it.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from kv_transfer.base import Source, Target
from kv_transfer.cells import Cells
from kv_transfer.codec import encode
from kv_transfer.messages import Data, Granted, Locked, Mapped, Written
from kv_transfer.peers import Peers
from kv_transfer.push import PushLink, PushTransport
from kv_transfer.runs import Runs
from kv_transfer.shared_memory import PeerMemory
from kv_transfer.wire_dtype import Native
from kv_transfer.writing import WritingLink
from tandem.config import TandemConfig
from tandem.errors import TransferFailed


class ShmTransport(PushTransport):
    name = "shm"

    def __init__(self, config: TandemConfig) -> None:
        super().__init__(config.worker.object_bytes, Native.name)
        self._peers = Peers()

    async def aclose(self) -> None:
        """See Transport."""
        await super().aclose()
        self._peers.close()

    def _link(self, call: Any, source: Source, target: Target) -> PushLink:
        return _ShmLink(call, source, target, self._peers)


class _ShmLink(WritingLink):
    """The lock of the reservation's blocks is held from before the grant until no thread writes any more."""

    # What is made is where it belongs: nothing of it is held here.
    ahead = 8

    def __init__(self, call: Any, source: Source, target: Target, peers: Peers) -> None:
        self._peers = peers
        # Holds the peer's memory and the lock.
        self._held = ExitStack()
        self._pool: Tensor | None = None
        super().__init__(call, source, target)

    def pack(self, sequence: int, layers: range, tokens: range, payload: Runs) -> tuple[Data, bytes]:
        """See Link. The payload is where it belongs on return."""
        assert self._pool is not None, "the blocks were granted before"
        crc = Cells(self._pool, self._blocks, layers, tokens).copy_from(payload)
        data = Written.of_ranges(sequence, layers, tokens, payload.nbytes, crc)
        return data, encode(data)

    def rest(self) -> None:
        """See Link. Lets go of the blocks."""
        self._pool = None
        self._held.close()

    async def _get_access(self) -> None:
        mapped, payload = await self._next(Mapped)
        layout = self._source.layout
        if mapped.memory_bytes != layout.payload_bytes(layout.num_layers, mapped.pool_blocks * layout.block_size):
            raise TransferFailed(f"the worker at {self._peer} maps another pool than this KV's")
        blocks = self._take_blocks(mapped, payload)
        memory = self._held.enter_context(self._peers.use(mapped))
        self._lock(memory, blocks[0])
        await self.write(encode(Locked()))
        await self._next(Granted)
        self._pool = layout.pool_in(torch.from_numpy(memory.bytes), mapped.pool_blocks)

    def _lock(self, memory: PeerMemory, key: int) -> None:
        memory.lock(key)
        self._held.callback(memory.unlock, key)
