"""The receiving end of one transfer, over any transport that delivers frames in order."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from functools import partial
from typing import Any

from kv_transfer.base import Counters, IncomingTransfer, TransferSummary
from kv_transfer.ends.admission import TransferAdmission
from kv_transfer.ends.tasks import Interrupt, finish
from kv_transfer.frames.cells import Cells, Native
from kv_transfer.frames.codec import CorruptFrame, chain_checksum, decode, encode
from kv_transfer.frames.layout import Coverage
from kv_transfer.frames.messages import Abandon, Data, Done, KVMessage, Open, Seal
from kv_transfer.frames.wire_dtype import wire_dtype
from tandem.errors import InternalError, TandemError, TransferFailed
from tandem.process import logs

# A sender opens its transfer at once.
OPEN_TIMEOUT_S = 5.0


class Intake:
    """How the payloads of one transfer come: with their frames, and they are copied into the blocks."""

    # Kind of the data frames; none of another is taken.
    kind: type[Data] = Data

    async def begin(
        self, incoming: IncomingTransfer, opening: Open, frames: AsyncIterator[bytes], interrupt: Interrupt
    ) -> None:
        """What must pass between the ends before data frames. Raises TransferFailed or Refused.

        interrupt: ends the transfer until `settle`, when this side finds out that no more can come.
        """

    async def fetch(self, data: Data, payload: memoryview) -> memoryview:
        """payload: what came with the frame. The result is what `store` takes: `data.payload_bytes`, if it is to be
        copied. Raises TransferFailed."""
        return payload

    def store(self, cells: Cells, wire: Native, data: Data, payload: memoryview) -> None:
        """In a thread, unless it is quick: verifies the payload, and puts it into its cells of the pool.

        Raises CorruptFrame; the cells may hold anything then.
        """
        if not wire.scatter(cells, payload, data.checksum):
            raise CorruptFrame(f"the payload of KV frame {data.sequence} fails its checksum")

    async def taken(self, data: Data) -> None:
        """The payload is in the pool."""

    def settle(self) -> None:
        """Before the transfer is told of a seal, or of an abandon. Raises TransferFailed when somebody still writes."""

    def leave(self) -> None:
        """The transfer has failed, perhaps after `settle`."""


class Receiver:
    """Takes frames in until the seal.

        new ──open──▶ filling ──seal──▶ full ──end of stream──▶ sealed (or abandoned)
         │             │  ▲ │  abandon   │                       incoming.sealed() (or .abandoned())
         │             │  └─┘ data       │
         │             └───────┬─────────┘
         │                     │ wrong or lost frame, cancel, broken lease
         ▼                     ▼
        refused              failed
        (never touched)       incoming.failed(), after the last write

    Frames are verified and written by threads, those that are quick by itself, at most `frames_in_flight` at a time;
    then the sender waits.
    """

    def __init__(
        self, admission: TransferAdmission, threads: Executor, frames_in_flight: int, counters: Counters, intake: Intake
    ) -> None:
        self._admission = admission
        self._threads = threads
        self._frames_in_flight = frames_in_flight
        self._counters = counters
        self._intake = intake

    async def receive(self, frames: AsyncIterator[bytes], lost: Callable[[], TandemError]) -> Done:
        """Returns when the KV is taken. `lost` says what a cancel or an early end means.

        Raises TransferFailed or Refused; the incoming transfer has been told.
        """
        started = time.monotonic()
        try:
            opening = await _opening(frames)
            logs.about(opening.request_id)
            incoming = self._admission.claim(opening)
            try:
                wire = wire_dtype(opening.wire_dtype, self._admission.layout)
                filling = _Filling(self._admission.check(incoming, opening), wire, incoming)
                with Interrupt() as interrupt:
                    incoming.when_over(interrupt.throw)
                    await self._intake.begin(incoming, opening, frames, interrupt)
                    last = await self._fill(filling, frames)
                if last is None:
                    raise lost()
                self._intake.settle()
                seconds = time.monotonic() - started
                if isinstance(last, Abandon):
                    incoming.abandoned()
                    return filling.taken
                await incoming.sealed(last.first_token, TransferSummary(last.bytes, last.frames, seconds))
            except BaseException as error:
                self._intake.leave()
                incoming.failed(_reason(error, lost))
                raise
        except BaseException as error:
            self._counters.failures += 1
            self._counters.corrupt_frames += isinstance(error, CorruptFrame)
            raise
        self._counters.sealed(seconds)
        return filling.taken

    async def _fill(self, filling: _Filling, frames: AsyncIterator[bytes]) -> Seal | Abandon | None:
        """Returns at the end of the stream, and not before the last write is done, whatever happens."""
        room = asyncio.Semaphore(self._frames_in_flight)
        try:
            async with asyncio.TaskGroup() as writes:
                async for frame in frames:
                    message, payload = decode(frame)
                    if type(message) is self._intake.kind:
                        filling.expect(message)
                        await room.acquire()
                        writes.create_task(self._write(filling, message, payload, room))
                    else:
                        filling.end(message)
        except BaseExceptionGroup as failures:
            # The first one is the reason, the others followed from it.
            raise failures.exceptions[0] from None
        return filling.last

    async def _write(self, filling: _Filling, data: Data, payload: memoryview, room: asyncio.Semaphore) -> None:
        incoming = filling.incoming
        try:
            payload = await self._intake.fetch(data, payload)
            with incoming.writing():
                await self._store(filling, data, payload)
            del payload  # nothing holds on to an object's memory that is said to be taken
            await self._intake.taken(data)
        finally:
            room.release()
        incoming.touch()
        self._counters.moved(data.payload_bytes)

    async def _store(self, filling: _Filling, data: Data, payload: memoryview) -> None:
        cells = Cells(filling.incoming.pool, filling.incoming.blocks, data.layers, data.tokens)
        work = partial(self._intake.store, cells, filling.wire, data, payload)
        if filling.wire.is_quick(cells):
            work()
        else:
            await finish(asyncio.get_running_loop().run_in_executor(self._threads, work))


class _Filling:
    """What has come so far, from headers alone."""

    def __init__(self, coverage: Coverage, wire: Native, incoming: IncomingTransfer) -> None:
        self.incoming = incoming
        self.wire = wire
        # What closes the transfer.
        self.last: Seal | Abandon | None = None
        self._coverage = coverage
        self._frames = self._bytes = self._checksum = 0

    @property
    def taken(self) -> Done:
        return Done(frames=self._frames, bytes=self._bytes)

    def expect(self, data: Data) -> None:
        """Raises TransferFailed unless this is the next frame, of the right size, and covers what nothing else did."""
        self._not_sealed()
        if data.sequence != self._frames:
            raise TransferFailed(f"KV frame {data.sequence} came where {self._frames} is next")
        self._coverage.add(data.layers, data.tokens)
        size = self.wire.payload_bytes(data.layer_count, data.tokens)
        if data.payload_bytes != size:
            raise TransferFailed(f"KV frame {data.sequence} holds {data.payload_bytes} bytes, its cells take {size}")
        self._frames += 1
        self._bytes += size
        self._checksum = chain_checksum(self._checksum, data)

    def end(self, message: KVMessage) -> None:
        """Raises TransferFailed unless this is the seal, nothing is missing and the totals agree; or an abandon."""
        self._not_sealed()
        if isinstance(message, Abandon):
            self.last = message
            return
        if not isinstance(message, Seal):
            raise TransferFailed(f"a frame of kind {message.kind} came within a transfer of another")
        self._coverage.check_complete()
        if (message.frames, message.bytes, message.checksum) != (self._frames, self._bytes, self._checksum):
            raise TransferFailed(
                f"the seal counts {message.frames} frames and {message.bytes} bytes, "
                f"{self._frames} and {self._bytes} came, or their checksums differ"
            )
        self.last = message

    def _not_sealed(self) -> None:
        if self.last is not None:
            raise TransferFailed("a frame came after the seal")


async def next_message(frames: AsyncIterator[bytes]) -> KVMessage | None:
    """None at the end of the stream."""
    async for frame in frames:
        return decode(frame)[0]
    return None


async def reply(context: Any, message: KVMessage, payload: bytes = b"") -> None:
    """To the sender. Raises TransferFailed when it has left."""
    try:
        await context.write(encode(message, payload))
    except Exception as failure:  # of gRPC's own, private kinds
        raise TransferFailed(f"the sender left in mid-transfer: {type(failure).__name__}") from None


async def _opening(frames: AsyncIterator[bytes]) -> Open:
    """Until then nothing bounds a stream: no reservation, and no deadline that is not the peer's own."""
    try:
        async with asyncio.timeout(OPEN_TIMEOUT_S):
            message = await next_message(frames)
    except TimeoutError:
        raise TransferFailed(f"the transfer has no open frame within {OPEN_TIMEOUT_S:g} s") from None
    if not isinstance(message, Open):
        raise TransferFailed("the transfer does not begin with an open frame")
    return message


def _reason(error: BaseException, lost: Callable[[], TandemError]) -> TandemError:
    if isinstance(error, TandemError):
        return error
    if isinstance(error, asyncio.CancelledError):
        return lost()
    return InternalError("a bug ended the transfer; the receiving worker's log has the details")
