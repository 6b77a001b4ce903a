"""Carrier `ray`: payloads are objects in Ray's object store, and a data frame brings the place of one.

Everything else is as in `grpc`: the order of frames, every check, deadline, cancel. Two workers of one Ray cluster can
use it; on one node the receiver reads the memory that the sender wrote.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict
from threading import Event
from typing import Annotated, Any, Self

from kv_transfer.base import Source, TransferTarget
from kv_transfer.carriers.ray.plasma import Place, Plasma, connect
from kv_transfer.ends.carrier import Carrier, PoolMemory
from kv_transfer.ends.link import Call, CarrierLink
from kv_transfer.ends.receiver import Intake, reply
from kv_transfer.ends.tasks import end
from kv_transfer.frames.codec import encode
from kv_transfer.frames.messages import MAX_OCTETS, Count, Data, Done, KVMessage, Limit, message
from kv_transfer.frames.runs import Runs
from kv_transfer.frames.wire_dtype import wire_dtype
from tandem.config import WorkerConfig
from tandem.errors import TransferFailed
from tandem.v1 import registry_pb2

# On one node, and from this much KV on, Ray's object store is faster than gRPC (docs/kv_transfer.md has the figures).
WINS_BYTES = 16 << 20
# A store that has room takes 16 MiB in 60 ms when its memory is touched for the first time, in 3 ms otherwise. One that
# has none makes the caller wait for a disk: gRPC is faster by then.
PLACE_TIMEOUT_S = 1.5
_PLACE_THREADS = 2
# A thread that waits for an object costs nothing, and those of a sender that is gone wait on for a while.
_TAKE_THREADS = 16
# Room for so many transfers at their largest is ample, for so long.
_AMPLE_WINDOWS, _AMPLE_S = 4, 0.5
_PlaceBytes = Annotated[bytes, Limit(bytes, 1, MAX_OCTETS)]


@message("placed")
class PlacedData(Data):
    """KV like a data frame's, but the payload lies in the object store."""

    object_id: _PlaceBytes
    owner: _PlaceBytes

    @classmethod
    def of(cls, data: Data, place: Place) -> PlacedData:
        return cls(**asdict(data), **asdict(place))

    @property
    def place(self) -> Place:
        return Place(self.object_id, self.owner)


@message("taken")
class Taken(KVMessage):
    """The receiver has written the payload of a placed frame: nobody needs the object any more."""

    sequence: Count


class RayCarrier(Carrier):
    """A transfer keeps at most `worker.frames_in_flight` objects in the store, and none after its end."""

    name = "ray"
    method = "PushPlaced"

    def __init__(self, worker: WorkerConfig, plasma: Plasma) -> None:
        super().__init__(worker)
        self.frame_bytes = worker.object_bytes
        self._plasma = plasma
        self._window = worker.frames_in_flight
        # On the event loop's clock.
        self._ample_until = 0.0
        self._place_threads = ThreadPoolExecutor(_PLACE_THREADS, thread_name_prefix="kv-place")
        self._take_threads = ThreadPoolExecutor(_TAKE_THREADS, thread_name_prefix="kv-take")

    @classmethod
    def make(cls, worker: WorkerConfig, memory: PoolMemory) -> Self | None:
        plasma = connect()
        return None if plasma is None else cls(worker, plasma)

    def announcement(self) -> registry_pb2.Transport:
        plasma = self._plasma
        return registry_pb2.Transport(
            name=self.name, domain=plasma.domain, node=plasma.node, rank=10, least_kv_bytes=WINS_BYTES
        )

    async def check_room(self, source: Source, target: TransferTarget) -> None:
        """See Carrier. Asking takes 3 ms, as long as a small transfer: ample room is believed in for a moment."""
        loop = asyncio.get_running_loop()
        if loop.time() < self._ample_until:
            return
        wire = wire_dtype(self.wire_dtype, source.layout)
        window = self._window * self.frame_bytes
        needed = min(len(target.travelling) * wire.cell_bytes * source.layout.num_layers, window)
        async with _in_time("did not say how full it is"):
            room = await loop.run_in_executor(self._place_threads, self._plasma.room)
        if room < needed:
            raise TransferFailed(f"Ray's object store has room for {room} bytes, the transfer needs {needed}")
        if room > _AMPLE_WINDOWS * window:
            self._ample_until = loop.time() + _AMPLE_S

    def link(self, call: Call) -> CarrierLink:
        return _RayLink(call, self._plasma, self._place_threads, self._window)

    def intake(self, context: Any) -> Intake:
        return _RayIntake(self._plasma, self._take_threads, context)

    async def aclose(self) -> None:
        await end(self._place_threads)
        await end(self._take_threads)


class _RayIntake(Intake):
    """Payloads are objects in the store, and each is acknowledged."""

    kind = PlacedData

    def __init__(self, plasma: Plasma, threads: Executor, context: Any) -> None:
        self._plasma = plasma
        self._threads = threads
        self._context = context
        # gRPC takes one write at a time.
        self._writing = asyncio.Lock()

    async def fetch(self, data: Data, payload: memoryview) -> memoryview:
        """See Intake. A cancel does not wait for the thread: it writes nowhere."""
        assert isinstance(data, PlacedData)
        unwanted = Event()
        try:
            loop = asyncio.get_running_loop()
            take = self._plasma.take
            return await loop.run_in_executor(self._threads, take, data.place, data.payload_bytes, unwanted)
        finally:
            unwanted.set()

    async def taken(self, data: Data) -> None:
        async with self._writing:
            await reply(self._context, Taken(data.sequence))


class _RayLink(CarrierLink):
    def __init__(self, call: Call, plasma: Plasma, threads: Executor, window: int) -> None:
        self._plasma = plasma
        self._threads = threads
        self._window = window
        # What the receiver has not taken yet, by sequence; an object is gone from the store once it is not here.
        self._held: dict[int, object] = {}
        self._closed = False
        self._fewer = asyncio.Event()
        super().__init__(call)

    def pack(self, sequence: int, layers: range, tokens: range, payload: Runs) -> tuple[Data, bytes]:
        whole, crc = payload.gathered()
        return Data.of_ranges(sequence, layers, tokens, len(whole), crc), whole

    async def carry(self, data: Data, packed: bytes) -> None:
        while len(self._held) >= self._window and not self._answer.done():
            self._fewer.clear()
            await self._fewer.wait()
        loop = asyncio.get_running_loop()
        async with _in_time(f"took no payload of {len(packed)} bytes"):
            place = await loop.run_in_executor(self._threads, self._put, data.sequence, packed)
        await self.write(encode(PlacedData.of(data, place)))

    def _put(self, sequence: int, payload: bytes) -> Place:
        """In a thread, which cannot be stopped: the transfer may be over when the object is there."""
        self._held[sequence], place = self._plasma.put(payload)
        if self._closed:
            self._held.clear()
        return place

    def close(self) -> None:
        """See CarrierLink. The store may forget what the receiver did not take."""
        super().close()
        self._closed = True
        self._held.clear()

    def _note(self, message: KVMessage, payload: memoryview) -> None:
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
