"""Transport `ray`: payloads are objects in Ray's object store, and a data frame brings the place of one.

Everything else is as in `grpc`: the order of frames, every check, deadline, cancel. Two workers of one Ray cluster can
use it; on one node the receiver reads the memory that the sender wrote.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from kv_transfer.base import Sender, Source, Target
from kv_transfer.codec import encode
from kv_transfer.messages import Data, Done, Message, Place, Placed, Taken
from kv_transfer.plasma import Plasma
from kv_transfer.push import PushLink, PushTransport
from kv_transfer.runs import Runs
from kv_transfer.threads import end
from kv_transfer.wire_dtype import wire_dtype
from tandem.config import TandemConfig
from tandem.errors import TransferFailed

# A store that has room takes 16 MiB in 60 ms when its memory is touched for the first time, in 3 ms otherwise. One that
# has none makes the caller wait for a disk: gRPC is faster by then.
PLACE_TIMEOUT_S = 1.5
_PLACE_THREADS = 2
# Room for so many transfers at their largest is ample, for so long.
_AMPLE_WINDOWS, _AMPLE_S = 4, 0.5


class RayTransport(PushTransport):
    """A transfer keeps at most `worker.frames_in_flight` objects in the store, and none after its end."""

    name = "ray"

    def __init__(self, config: TandemConfig, plasma: Plasma) -> None:
        super().__init__(config.worker.object_bytes, config.worker.wire_dtype)
        self._plasma = plasma
        self._window = config.worker.frames_in_flight
        # On the event loop's clock.
        self._ample_until = 0.0
        self._place_threads = ThreadPoolExecutor(_PLACE_THREADS, thread_name_prefix="kv-place")

    @asynccontextmanager
    async def open(self, source: Source, target: Target) -> AsyncIterator[Sender]:
        """See Transport. Raises TransferFailed when the store has no room for it."""
        await self._check_room(source, target)
        async with super().open(source, target) as sender:
            yield sender

    async def aclose(self) -> None:
        """See Transport."""
        await super().aclose()
        await end(self._place_threads)

    async def _check_room(self, source: Source, target: Target) -> None:
        """Asking takes 3 ms, as long as a small transfer: ample room is believed in for a moment."""
        loop = asyncio.get_running_loop()
        if loop.time() < self._ample_until:
            return
        wire = wire_dtype(self._wire_dtype, source.layout)
        window = self._window * self._frame_bytes
        needed = min(len(target.travelling) * wire.cell_bytes * source.layout.num_layers, window)
        async with _in_time("did not say how full it is"):
            room = await loop.run_in_executor(self._place_threads, self._plasma.room)
        if room < needed:
            raise TransferFailed(f"Ray's object store has room for {room} bytes, the transfer needs {needed}")
        if room > _AMPLE_WINDOWS * window:
            self._ample_until = loop.time() + _AMPLE_S

    def _link(self, call: Any, source: Source, target: Target) -> PushLink:
        return _RayLink(call, target.address, self._plasma, self._place_threads, self._window)


class _RayLink(PushLink):
    def __init__(self, call: Any, peer: str, plasma: Plasma, threads: Executor, window: int) -> None:
        self._plasma = plasma
        self._threads = threads
        self._window = window
        # What the receiver has not taken yet, by sequence; an object is gone from the store once it is not here.
        self._held: dict[int, object] = {}
        self._closed = False
        self._fewer = asyncio.Event()
        super().__init__(call, peer)

    def pack(self, sequence: int, layers: range, tokens: range, payload: Runs) -> tuple[Data, bytes]:
        """See Link."""
        whole, crc = payload.gathered()
        return Data.of_ranges(sequence, layers, tokens, len(whole), crc), whole

    async def carry(self, data: Data, packed: bytes) -> None:
        """See Link."""
        while len(self._held) >= self._window and not self._answer.done():
            self._fewer.clear()
            await self._fewer.wait()
        await self.write(encode(Placed.of(data, await self._place(data.sequence, packed))))

    async def _place(self, sequence: int, payload: bytes) -> Place:
        loop = asyncio.get_running_loop()
        async with _in_time(f"took no payload of {len(payload)} bytes"):
            return await loop.run_in_executor(self._threads, self._put, sequence, payload)

    def _put(self, sequence: int, payload: bytes) -> Place:
        """In a thread, which cannot be stopped: the transfer may be over when the object is there."""
        self._held[sequence], place = self._plasma.put(payload)
        if self._closed:
            self._held.clear()
        return place

    def close(self) -> None:
        """See PushLink. The store may forget what the receiver did not take."""
        super().close()
        self._closed = True
        self._held.clear()

    def _note(self, message: Message, payload: memoryview) -> None:
        if not isinstance(message, Taken):
            super()._note(message, payload)
            return
        self._held.pop(message.sequence, None)
        self._fewer.set()

    def _on_end(self, answer: asyncio.Task[Done]) -> None:
        super()._on_end(answer)
        self._fewer.set()


@asynccontextmanager
async def _in_time(failure: str) -> AsyncIterator[None]:
    """Around the work of a thread, which may be busy with what the store did not take from another transfer."""
    try:
        async with asyncio.timeout(PLACE_TIMEOUT_S):
            yield
    except TimeoutError:
        raise TransferFailed(f"Ray's object store {failure} within {PLACE_TIMEOUT_S} s") from None
    except RuntimeError:  # no thread takes work any more
        raise TransferFailed("the transport was closed in mid-transfer") from None
