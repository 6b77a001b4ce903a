"""The sending end of one transfer, over any link that delivers frames in order."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager

from kv_transfer.base import Counters, Source, TransferSummary, TransferTarget
from kv_transfer.ends.link import CarrierLink
from kv_transfer.ends.tasks import finish, note_failure
from kv_transfer.frames.cells import Cells, Native
from kv_transfer.frames.codec import chain_checksum, encode
from kv_transfer.frames.layout import Coverage, KVLayout, cut
from kv_transfer.frames.messages import Abandon, Data, Open, Seal
from tandem.errors import Refused, TransferFailed


def opening_of(target: TransferTarget, wire_dtype: str = Native.name) -> Open:
    return Open(
        reservation_id=target.reservation_id,
        request_id=target.request_id,
        attempt=target.attempt,
        fingerprint=target.fingerprint,
        token_start=target.cached_tokens,
        token_stop=target.prompt_tokens,
        wire_dtype=wire_dtype,
    )


def check_source(source: Source, target: TransferTarget) -> None:
    """Raises Refused unless the source's pool and block table hold the prompt in the target's layout."""
    if KVLayout.of(target.fingerprint) != source.layout:
        raise Refused(f"the source's {source.layout} is not the target's {KVLayout.of(target.fingerprint)}")
    source.layout.check_pool(source.pool, source.blocks, target.prompt_tokens)


class FrameSender:
    """A Sender that cuts, gathers and numbers frames.

    Threads make them, and go from one to the next by themselves; quick ones `send` makes itself. A task carries what is
    made, in order, until nothing is under way. `send` waits for neither while there is room for more (`ahead`):
    the frames of one call are made while those of the last one leave.
    """

    def __init__(
        self,
        source: Source,
        target: TransferTarget,
        link: CarrierLink,
        wire: Native,
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
        # Frames under way: made, in the making, or (the first) leaving.
        self._made: deque[asyncio.Future[tuple[Data, bytes]]] = deque()
        # Carries them; its failure is raised by whoever calls next.
        self._carrying: asyncio.Task[None] | None = None
        # Set when one has left, and when the carrying ends.
        self._progress = asyncio.Event()
        # Sealed, or abandoned with the receiver's knowledge.
        self._over = False
        self._abandoned = False
        # A frame that no thread has begun is not made any more.
        self._unwanted = False
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
                await self._link.ready()
            for part_layers, part_tokens in cut(layers, fresh, self._frame_cells):
                await self._until_under_way(self._link.ahead)
                if self._abandoned:
                    return
                cells = Cells(self._source.pool, self._source.blocks, part_layers, part_tokens)
                self._made.append(self._make(cells))
                if self._carrying is None or self._carrying.done():
                    self._carrying = asyncio.create_task(self._carry())
                    self._carrying.add_done_callback(self._on_carried)
                await asyncio.sleep(0)  # others get the event loop between two frames that it makes itself

    async def seal(self, first_token: int, prefilled_s: float | None = None) -> TransferSummary:
        """See Sender."""
        self._coverage.check_complete()
        await self._until_under_way(0)
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
            if self._carrying is not None:
                await self._carrying
            self._unwanted = True
            await self._stop_making()
            await self._link.write(encode(Abandon()))
            await self._link.finish()
        self._over = True

    async def close(self) -> None:
        """Returns when no thread reads the source any more."""
        self._unwanted = True
        if not self._over:
            self._counters.failures += 1
        try:
            if self._carrying is not None:
                self._carrying.cancel()
                await finish(asyncio.gather(self._carrying, return_exceptions=True))
        finally:  # a cancel waits too
            await self._stop_making()

    async def _stop_making(self) -> None:
        """Whatever frames under way would have been, nobody wants them."""
        try:
            await finish(asyncio.gather(*self._made, return_exceptions=True))
        finally:
            self._made.clear()
            self._link.rest()

    def _make(self, cells: Cells) -> asyncio.Future[tuple[Data, bytes]]:
        sequence = self._cut_frames
        self._cut_frames += 1
        loop = asyncio.get_running_loop()
        if self._wire.is_quick(cells):
            made = loop.create_future()
            made.set_result(self._gather(sequence, cells))
            return made
        try:
            return loop.run_in_executor(self._threads, self._gather, sequence, cells)
        except RuntimeError:  # no thread takes work any more
            raise TransferFailed("the transport was closed in mid-transfer") from None

    async def _until_under_way(self, most: int) -> None:
        """Returns when no more frames than that are under way, or nobody wants them. Raises why they go no further."""
        while True:
            if self._carrying is not None and self._carrying.done():
                self._carrying.result()
            if len(self._made) <= most or self._abandoned:
                return
            self._progress.clear()
            await self._progress.wait()

    def _on_carried(self, carrying: asyncio.Task[None]) -> None:
        note_failure(carrying)
        self._progress.set()

    async def _carry(self) -> None:
        with self._work.measure():
            while self._made and not self._abandoned:
                await self._carry_next()
                self._progress.set()

    async def _carry_next(self) -> None:
        """A frame that has left is held by nobody when this returns."""
        data, packed = await finish(self._made[0])
        await self._link.carry(data, packed)
        del self._made[0]
        self._frames += 1
        self._bytes += data.payload_bytes
        self._checksum = chain_checksum(self._checksum, data)
        self._counters.moved(data.payload_bytes)

    def _gather(self, sequence: int, cells: Cells) -> tuple[Data, bytes]:
        """In a thread, unless it is quick."""
        if self._unwanted:
            raise TransferFailed("the transfer is over")
        return self._link.pack(sequence, cells.layers, cells.tokens, self._wire.pieces(cells))


class WorkTime:
    """How long a transfer was worked on, in spans one after another, on time.monotonic's clock."""

    def __init__(self) -> None:
        self._spans: list[tuple[float, float]] = []

    @contextmanager
    def measure(self) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self._spans.append((started, time.monotonic()))

    @property
    def seconds(self) -> float:
        return sum(end - start for start, end in self._spans)

    def before(self, moment: float | None) -> float:
        """Seconds that lay before it; all, if it is not known."""
        if moment is None:
            return self.seconds
        return sum(max(0.0, min(end, moment) - start) for start, end in self._spans)
