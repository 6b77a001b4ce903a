"""The shared memories of peers, each mapped once and kept for the next transfer."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from kv_transfer.carriers.shm.memory import PeerMemory
from kv_transfer.carriers.shm.messages import Mapped
from kv_transfer.ends.idle_pool import IdlePool
from tandem.errors import TransferFailed

MAX_PEERS = 64


class _Peer:
    def __init__(self, mapped: Mapped) -> None:
        self.memory = PeerMemory(mapped.pid, mapped.fd, mapped.memory_id, mapped.memory_bytes)
        # Or nobody needs it any more.
        self.has_ended = False
        try:
            # Readable when the process has ended.
            self.process = os.pidfd_open(mapped.pid)
        except OSError:
            self.memory.close()
            raise TransferFailed("the peer whose pool this is has ended") from None

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self.process)
        self.memory.close()
        os.close(self.process)


class Peers:
    """A mapping keeps the memory of a process that has ended: it is dropped then, at once or with its last user."""

    def __init__(self, most: int = MAX_PEERS) -> None:
        full = f"KV is on its way into the pools of {most} peers already"
        # By the memory's id.
        self._pool: IdlePool[str, _Peer] = IdlePool(most, _Peer.close, full)

    @contextmanager
    def use(self, mapped: Mapped) -> Iterator[PeerMemory]:
        """Raises TransferFailed for memory that is not what it should be, Overloaded when all that fit are in use."""
        try:
            with self._pool.use(mapped.memory_id, partial(self._map, mapped)) as peer:
                if peer.memory.size != mapped.memory_bytes:
                    raise TransferFailed("the peer's pool has changed its size")
                yield peer.memory
        finally:
            self._drop_ended()

    def close(self) -> None:
        for kept in list(self._pool.kept.values()):
            self._on_end(kept.value)

    def _map(self, mapped: Mapped) -> _Peer:
        peer = _Peer(mapped)
        asyncio.get_running_loop().add_reader(peer.process, self._on_end, peer)
        return peer

    def _on_end(self, peer: _Peer) -> None:
        asyncio.get_running_loop().remove_reader(peer.process)
        peer.has_ended = True
        self._drop_ended()

    def _drop_ended(self) -> None:
        for memory_id, kept in list(self._pool.kept.items()):
            if kept.value.has_ended and not kept.users:
                del self._pool.kept[memory_id]
                kept.value.close()
