"""The shared memories of peers, each mapped once and kept for the next transfer."""

from __future__ import annotations

import asyncio
import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from kv_transfer.messages import Mapped
from kv_transfer.shared_memory import PeerMemory
from tandem.errors import Overloaded, TransferFailed

MAX_PEERS = 64


class _Peer:
    def __init__(self, mapped: Mapped) -> None:
        self.memory = PeerMemory(mapped.pid, mapped.fd, mapped.memory_id, mapped.memory_bytes)
        self.users = 0
        try:
            # Readable when the process has ended.
            self.process = os.pidfd_open(mapped.pid)
        except OSError:
            self.memory.close()
            raise TransferFailed("the peer whose pool this is has ended") from None

    def close(self) -> None:
        self.memory.close()
        os.close(self.process)


class Peers:
    """A mapping keeps the memory of a process that has ended: it is dropped then, at once or with its last user."""

    def __init__(self, most: int = MAX_PEERS) -> None:
        self._most = most
        # Least recently used first.
        self._by_id: OrderedDict[str, _Peer] = OrderedDict()

    @contextmanager
    def use(self, mapped: Mapped) -> Iterator[PeerMemory]:
        """Raises TransferFailed for memory that is not what it should be, Overloaded when all that fit are in use."""
        peer = self._by_id.get(mapped.memory_id) or self._map(mapped)
        self._by_id.move_to_end(mapped.memory_id)
        peer.users += 1
        try:
            if peer.memory.size != mapped.memory_bytes:
                raise TransferFailed("the peer's pool has changed its size")
            yield peer.memory
        finally:
            peer.users -= 1
            if not peer.users and self._by_id.get(mapped.memory_id) is not peer:
                peer.close()

    def close(self) -> None:
        for memory_id in list(self._by_id):
            self._drop(memory_id)

    def _map(self, mapped: Mapped) -> _Peer:
        if len(self._by_id) >= self._most:
            idle = next((memory_id for memory_id, peer in self._by_id.items() if not peer.users), None)
            if idle is None:
                raise Overloaded(f"KV is on its way into the pools of {self._most} peers already")
            self._drop(idle)
        peer = self._by_id[mapped.memory_id] = _Peer(mapped)
        asyncio.get_running_loop().add_reader(peer.process, self._drop, mapped.memory_id)
        return peer

    def _drop(self, memory_id: str) -> None:
        peer = self._by_id.pop(memory_id)
        asyncio.get_running_loop().remove_reader(peer.process)
        if not peer.users:
            peer.close()
