"""gRPC channels to peers, one an address, bounded in number."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc

from tandem.errors import Overloaded
from tandem.rpc import make_channel

MAX_CHANNELS = 64


class Channels:
    """Kept for reuse; beyond the bound the one that has been idle longest is closed."""

    def __init__(self, max_message_bytes: int, most: int = MAX_CHANNELS) -> None:
        self._max_message_bytes = max_message_bytes
        self._most = most
        # Least recently used first.
        self._open: OrderedDict[str, grpc.aio.Channel] = OrderedDict()
        self._users: Counter[str] = Counter()

    @asynccontextmanager
    async def use(self, address: str) -> AsyncIterator[grpc.aio.Channel]:
        """Raises Overloaded when the bound is reached and none is idle."""
        self._users[address] += 1
        try:
            if address not in self._open:
                await self._make_room()
            # Another user may have dialled meanwhile.
            channel = self._open.get(address) or make_channel(address, self._max_message_bytes)
            self._open[address] = channel
            self._open.move_to_end(address)
            yield channel
        finally:
            self._users[address] -= 1
            if not self._users[address]:
                del self._users[address]

    async def aclose(self) -> None:
        while self._open:
            _, channel = self._open.popitem()
            await channel.close(None)

    async def _make_room(self) -> None:
        while len(self._open) >= self._most:
            idle = next((address for address in self._open if not self._users[address]), None)
            if idle is None:
                raise Overloaded(f"KV is on its way to {self._most} peers already")
            await self._open.pop(idle).close(None)
