"""The sending end of one transfer, over any link that delivers frames in order."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Protocol

from kv_transfer.base import Counters, Source, Target, TransferSummary
from kv_transfer.codec import chain_checksum, encode
from kv_transfer.coverage import Coverage
from kv_transfer.layout import KVLayout, cut
from kv_transfer.messages import Abandon, Data, Done, Open, Seal
from kv_transfer.threads import finish
from kv_transfer.wire_dtype import Native, WireDtype
from kv_transfer.worktime import WorkTime
from tandem.errors import Refused, TransferFailed


class Link(Protocol):
    """Carries the frames of one transfer. Raises the receiver's error, or WorkerLost, DeadlineExceeded."""

    @property
    def makers(self) -> int:
        """How many threads make frames at once; each has one in memory, and one more leaves."""

    async def ready(self) -> None:
        """Returns when frames may be made: before the first, and at once ever after."""

    def pack(self, sequence: int, layers: range, tokens: range, payload: Sequence[memoryview]) -> tuple[Data, bytes]:
        """In a thread: makes a frame, copying a payload's parts into what `carry` takes."""

    async def carry(self, data: Data, packed: bytes) -> None:
        """Sends a data frame. Returns when there is room for the next one."""

    async def write(self, frame: bytes) -> None:
        """Sends any other frame."""

    def rest(self) -> None:
        """No thread makes a frame, now or later. Called before the seal, and at any other end; perhaps twice."""

    async def finish(self) -> Done:
        """Says that no frame follows; returns the receiver's answer."""


def opening_of(target: Target, wire_dtype: str = Native.name) -> Open:
    return Open(
        reservation_id=target.reservation_id,
        request_id=target.request_id,
        attempt=target.attempt,
        fingerprint=target.fingerprint,
        token_start=target.cached_tokens,
        token_stop=target.prompt_tokens,
        wire_dtype=wire_dtype,
    )


def check_source(source: Source, target: Target) -> None:
    """Raises Refused unless the source's pool and block table hold the prompt in the target's layout."""
    if KVLayout.of(target.fingerprint) != source.layout:
        raise Refused(f"the source's {source.layout} is not the target's {KVLayout.of(target.fingerprint)}")
    source.layout.check_pool(source.pool, source.blocks, target.prompt_tokens)


class FrameSender:
    """A Sender that cuts, gathers and numbers frames: one leaves while the next ones are made (`Link.makers`)."""

    def __init__(
        self,
        source: Source,
        target: Target,
        link: Link,
        wire: WireDtype,
        frame_bytes: int,
        threads: Executor,
        counters: Counters,
    ) -> None:
        self._source = source
        self._target = target
        self._link = link
        self._wire = wire
        self._frame_cells = frame_bytes // wire.cell_bytes
        self._threads = threads
        self._counters = counters
        self._coverage = Coverage(source.layout.num_layers, target.travelling)
        self._cut_frames = self._bytes = self._frames = self._checksum = 0
        self._work = WorkTime()
        # Frames that threads make while the one before them leaves.
        self._made: deque[asyncio.Future[tuple[Data, bytes]]] = deque()
        # Sealed, or abandoned with the receiver's knowledge.
        self._over = False
        self._abandoned = False
        # Held by the call under way.
        self._busy = asyncio.Lock()

    async def open(self) -> None:
        """Sends the open frame."""
        await self._link.write(encode(opening_of(self._target, self._wire.name)))

    async def send(self, layers: range, tokens: range) -> None:
        """See Sender."""
        fresh = range(max(tokens.start, self._target.cached_tokens), tokens.stop)
        if not fresh:
            return
        self._coverage.add(layers, fresh)
        async with self._busy:
            with self._work.measure():
                await self._send(layers, fresh)

    async def _send(self, layers: range, tokens: range) -> None:
        await self._link.ready()
        for part_layers, part_tokens in cut(layers, tokens, self._frame_cells):
            if self._abandoned:
                return
            self._made.append(self._make(part_layers, part_tokens))
            if len(self._made) > self._link.makers:
                await self._carry_next()
        while self._made:
            await self._carry_next()

    async def seal(self, first_token: int, prefilled_s: float | None = None) -> TransferSummary:
        """See Sender."""
        self._coverage.check_complete()
        with self._work.measure():
            self._link.rest()
            await self._link.write(encode(Seal(first_token, self._frames, self._bytes, self._checksum)))
            done = await self._link.finish()
        if (done.frames, done.bytes) != (self._frames, self._bytes):
            raise TransferFailed(f"{self._bytes} bytes of KV were sent, the receiver acknowledged {done.bytes}")
        self._over = True
        seconds, hidden = self._work.seconds, self._work.before(prefilled_s)
        self._counters.sealed(seconds, hidden)
        return TransferSummary(self._bytes, self._frames, seconds, hidden)

    async def abandon(self) -> None:
        """See Sender."""
        self._abandoned = True
        async with self._busy:
            await self._link.ready()
            await self._stop_making()
            await self._link.write(encode(Abandon()))
            await self._link.finish()
        self._over = True

    async def close(self) -> None:
        """Returns when no thread reads the source any more."""
        if not self._over:
            self._counters.failures += 1
        await self._stop_making()

    async def _stop_making(self) -> None:
        """Whatever frames under way would have been, nobody wants them."""
        try:
            await finish(asyncio.gather(*self._made, return_exceptions=True))
        finally:
            self._made.clear()
            self._link.rest()

    def _make(self, layers: range, tokens: range) -> asyncio.Future[tuple[Data, bytes]]:
        sequence = self._cut_frames
        self._cut_frames += 1
        loop = asyncio.get_running_loop()
        try:
            return loop.run_in_executor(self._threads, self._gather, sequence, layers, tokens)
        except RuntimeError:  # no thread takes work any more
            raise TransferFailed("the transport was closed in mid-transfer") from None

    async def _carry_next(self) -> None:
        """Sends the frame made first, while others are made."""
        data, packed = await finish(self._made[0])
        del self._made[0]
        await self._link.carry(data, packed)
        self._frames += 1
        self._bytes += data.payload_bytes
        self._checksum = chain_checksum(self._checksum, data)
        self._counters.moved(data.payload_bytes)

    def _gather(self, sequence: int, layers: range, tokens: range) -> tuple[Data, bytes]:
        """In a thread."""
        parts = self._wire.pieces(self._source.pool, self._source.blocks, layers, tokens)
        return self._link.pack(sequence, layers, tokens, parts)
