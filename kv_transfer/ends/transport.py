"""The sending side of tandem.v1.KVTransfer: transfers by one carrier, over one channel a peer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

import grpc

from kv_transfer.base import Counters, Sender, Source, TransferTarget, Transport
from kv_transfer.ends.carrier import Carrier
from kv_transfer.ends.idle_pool import IdlePool
from kv_transfer.ends.link import MAX_MESSAGE_BYTES, Call
from kv_transfer.ends.sender import FrameSender, check_source
from kv_transfer.ends.tasks import copy_threads, end
from kv_transfer.frames.wire_dtype import wire_dtype
from tandem.rpc import make_channel

MAX_CHANNELS = 64


class PushTransport:
    """A Transport."""

    def __init__(self, carrier: Carrier) -> None:
        self.name = carrier.name
        self.counters = Counters()
        self._carrier = carrier
        # Copy KV.
        self.threads = copy_threads("kv-send")
        self._channels = Channels(MAX_MESSAGE_BYTES)

    @asynccontextmanager
    async def open(self, source: Source, target: TransferTarget) -> AsyncIterator[Sender]:
        """See Transport. Raises TransferFailed too, where the carrier has no room."""
        carrier = self._carrier
        await carrier.check_room(source, target)
        check_source(source, target)
        async with self._channels.use(target.address) as channel:
            wire = wire_dtype(carrier.wire_dtype, source.layout)
            link = carrier.link(Call(channel, carrier.method, source, target))
            sender = FrameSender(source, target, link, wire, carrier.frame_bytes, self.threads, self.counters)
            try:
                await sender.open()
                yield sender
            finally:
                self.counters.corrupt_frames += link.heard_corrupt
                link.close()
                try:
                    await sender.close()
                finally:
                    await link.gone()

    async def aclose(self) -> None:
        """See Transport. Channels, threads and the carrier are gone on return."""
        await self._channels.aclose()
        await end(self.threads)
        await self._carrier.aclose()


def transports_of(carriers: Iterable[Carrier]) -> dict[str, Transport]:
    """By name."""
    return {carrier.name: PushTransport(carrier) for carrier in carriers}


class Channels:
    """gRPC channels to peers, one an address, kept for the next transfer."""

    def __init__(self, max_message_bytes: int, most: int = MAX_CHANNELS) -> None:
        self._max_message_bytes = max_message_bytes
        # Those that made room, until they are closed.
        self._unwanted: list[grpc.aio.Channel] = []
        self._pool: IdlePool[str, grpc.aio.Channel] = IdlePool(
            most, self._unwanted.append, f"KV is on its way to {most} peers already"
        )

    @asynccontextmanager
    async def use(self, address: str) -> AsyncIterator[grpc.aio.Channel]:
        """Raises Overloaded when the bound is reached and none is idle."""
        with self._pool.use(address, lambda: make_channel(address, self._max_message_bytes)) as channel:
            await self._close_unwanted()
            yield channel

    async def aclose(self) -> None:
        while self._pool.kept:
            self._unwanted.append(self._pool.kept.popitem()[1].value)
        await self._close_unwanted()

    async def _close_unwanted(self) -> None:
        while self._unwanted:
            await self._unwanted.pop().close(None)
