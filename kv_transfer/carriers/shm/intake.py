"""The receiving end of `shm`: the sender writes into the pool itself, and is fenced off from blocks that are others'.

    begun ──mapped, locked──▶ granted ──seal or abandon, lock free──▶ settled
      │                          └── any other end ──▶ lock free: settled
      │                                          └──▶ lock held: fenced ──it is free──▶ settled
      └── no lock: nobody was told to write

From the grant until the sender's lock is free, the transfer's blocks are in use (`IncomingTransfer.writing`): when
the reservation ends meanwhile they are quarantined, and go to nobody else. A lock is free when the sender let go of it,
after its last write, or when its process is gone.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import Any

from kv_transfer.base import IncomingTransfer
from kv_transfer.carriers.shm.memory import SharedMemory
from kv_transfer.carriers.shm.messages import Granted, Locked, Mapped
from kv_transfer.ends.one_sided import Fences, WrittenIntake, block_ids
from kv_transfer.ends.receiver import next_message, reply
from kv_transfer.ends.tasks import Interrupt
from kv_transfer.frames.messages import Open
from kv_transfer.frames.runs import crc32
from tandem.errors import TransferFailed
from tandem.process import logs

# How often a lock is looked at whose sender is not heard of any more: a look takes a microsecond.
_FIRST_LOOK_S, _LONGEST_WAIT_S = 0.001, 0.1


async def _watch(memory: SharedMemory, key: int, request_id: str) -> None:
    log = logs.of_request(__name__, request_id)
    log.warning("its sender holds the blocks of a reservation that is over: they wait for it in quarantine")
    wait_s = _FIRST_LOOK_S
    while memory.locked(key):
        await asyncio.sleep(wait_s)
        wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
    log.info("its sender has let go of the blocks")


class MappedIntake(WrittenIntake):
    """The Intake of one transfer through shared memory."""

    def __init__(self, memory: SharedMemory, fences: Fences, context: Any) -> None:
        self._memory = memory
        self._fences = fences
        self._context = context
        self._request_id = ""
        # The lock's: the first block that is written, which no other reservation writes.
        self._key = 0
        # Holds the transfer's blocks from the grant on.
        self._blocks = ExitStack()
        self._granted = False

    async def _give_access(
        self, incoming: IncomingTransfer, opening: Open, frames: AsyncIterator[bytes], interrupt: Interrupt
    ) -> None:
        pool, memory = incoming.pool, self._memory
        assert memory.is_at(pool.data_ptr()), "the worker's pool is its shared memory"
        blocks, ids = block_ids(incoming, opening.tokens)
        self._key = blocks[0]
        mapped = Mapped(os.getpid(), memory.fd, memory.id, memory.size, pool.shape[2], len(blocks), crc32(ids))
        await reply(self._context, mapped, ids)
        if not isinstance(await next_message(frames), Locked):
            raise TransferFailed("the sender left before it held the lock of the blocks")
        if not memory.locked(self._key):
            raise TransferFailed("the sender does not hold the lock of the blocks in this worker's memory")
        self._request_id = incoming.request_id
        self._blocks.enter_context(incoming.writing())
        self._granted = True
        await reply(self._context, Granted())

    def settle(self) -> None:
        if self._written_into():
            raise TransferFailed("the sender has sealed blocks that it may still write into")
        self._blocks.close()

    def leave(self) -> None:
        if self._written_into():
            self._fences.keep(self._blocks.pop_all(), _watch(self._memory, self._key, self._request_id))
        self._blocks.close()

    def _written_into(self) -> bool:
        return self._granted and self._memory.locked(self._key)
