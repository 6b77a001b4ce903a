"""Transport `shm`: the sender writes into the reserved blocks, in memory that both processes have.

What moves is the pool's own bytes, whatever `worker.wire_dtype` says.
Everything else is as in `grpc`: the order of frames, every check, deadline, cancel. Two workers of one host can use it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from kv_transfer.base import Source, Target
from kv_transfer.codec import encode
from kv_transfer.layout import blocks_of
from kv_transfer.messages import Data, Done, Granted, Locked, Mapped, Message, Written
from kv_transfer.peers import Peers
from kv_transfer.pool_io import Rows, copy_parts
from kv_transfer.push import PushLink, PushTransport
from kv_transfer.shared_memory import PeerMemory
from kv_transfer.wire_dtype import Native
from tandem.config import TandemConfig
from tandem.errors import TransferFailed

# More is out of the cache when the receiver looks at it, and leaves one of the copy threads idle for longer.
FRAME_BYTES = 4 << 20


class ShmTransport(PushTransport):
    name = "shm"

    def __init__(self, config: TandemConfig) -> None:
        super().__init__(min(config.worker.object_bytes, FRAME_BYTES), Native.name)
        self._peers = Peers()

    async def aclose(self) -> None:
        """See Transport."""
        await super().aclose()
        self._peers.close()

    def _link(self, call: Any, source: Source, target: Target) -> PushLink:
        return _ShmLink(call, source, target, self._peers)


class _ShmLink(PushLink):
    """The lock of the reservation's blocks is held from before the grant until no thread writes any more."""

    # Copies keep two threads busy.
    makers = 2

    def __init__(self, call: Any, source: Source, target: Target, peers: Peers) -> None:
        self._source = source
        self._target = target
        self._peers = peers
        self._said: asyncio.Queue[tuple[Message, memoryview] | None] = asyncio.Queue()
        # Holds the peer's memory and the lock.
        self._held = ExitStack()
        self._rows: Rows | None = None
        # The receiver's block table, as far as it may be written; the rest is never looked at.
        self._blocks: Sequence[int] = ()
        super().__init__(call, target.address)
        self._access = asyncio.create_task(self._get_access()) if target.travelling else None
        if self._access is not None:
            self._access.add_done_callback(_see)

    async def ready(self) -> None:
        """See Link."""
        if self._access is not None:
            await self._access

    def pack(self, sequence: int, layers: range, tokens: range, payload: Sequence[memoryview]) -> tuple[Data, bytes]:
        """See Link. The payload is where it belongs on return."""
        assert self._rows is not None, "the blocks were granted before"
        crc = copy_parts(payload, self._rows, self._blocks, self._source.layout.block_size, layers, tokens)
        size = sum(part.nbytes for part in payload)
        data = Written(sequence, layers.start, len(layers), tokens.start, len(tokens), size, crc)
        return data, encode(data)

    async def carry(self, data: Data, packed: bytes) -> None:
        """See Link."""
        await self.write(packed)

    def rest(self) -> None:
        """See Link. Lets go of the blocks."""
        self._rows = None
        self._held.close()

    def close(self) -> None:
        """See PushLink."""
        super().close()
        if self._access is not None:
            self._access.cancel()

    async def _get_access(self) -> None:
        mapped, payload = await self._next(Mapped)
        assert isinstance(mapped, Mapped)
        blocks = self._check(mapped, payload)
        memory = self._held.enter_context(self._peers.use(mapped))
        self._lock(memory, blocks[0])
        await self.write(encode(Locked()))
        await self._next(Granted)
        layout = self._source.layout
        self._rows = memory.bytes.reshape(layout.num_layers, 2, mapped.pool_blocks * layout.block_size, -1)
        # Positions before the first that travels are in blocks that were not named.
        self._blocks = (*[-1] * (self._target.cached_tokens // layout.block_size), *blocks)

    def _lock(self, memory: PeerMemory, key: int) -> None:
        memory.lock(key)
        self._held.callback(memory.unlock, key)

    def _check(self, mapped: Mapped, payload: memoryview) -> list[int]:
        """The blocks. Raises TransferFailed unless they and the pool are what this side computes."""
        layout, travelling = self._source.layout, self._target.travelling
        size = layout.payload_bytes(layout.num_layers, mapped.pool_blocks * layout.block_size)
        blocks: list[int] = np.frombuffer(payload, dtype=">u4").tolist()
        if mapped.memory_bytes != size or len(blocks) != len(blocks_of(travelling, layout.block_size)):
            raise TransferFailed(f"the worker at {self._peer} maps another pool or other blocks than these KV take")
        if max(blocks) >= mapped.pool_blocks:
            raise TransferFailed(f"the worker at {self._peer} maps blocks outside its pool")
        return blocks

    async def _next(self, kind: type[Message]) -> tuple[Message, memoryview]:
        """The receiver's next words. Raises what it ended the call with."""
        said = await self._said.get()
        if said is None:
            await self._answer
            raise TransferFailed(f"the worker at {self._peer} ended the transfer before it began")
        if not isinstance(said[0], kind):
            raise TransferFailed(f"the worker at {self._peer} said {type(said[0]).__name__} out of turn")
        return said

    def _note(self, message: Message, payload: memoryview) -> None:
        if not isinstance(message, Mapped | Granted) or self._said.qsize() > 1:
            super()._note(message, payload)
        self._said.put_nowait((message, payload))

    def _on_end(self, answer: asyncio.Task[Done]) -> None:
        super()._on_end(answer)
        self._said.put_nowait(None)


def _see(access: asyncio.Task[None]) -> None:
    """A failure is of interest to those who wait for access, and perhaps nobody does."""
    if not access.cancelled():
        access.exception()
