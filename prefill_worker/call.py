"""One Prefill call, from the queue to the seal."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from kv_transfer.base import Sender, Source, Target, Transport
from kv_transfer.layout import KVLayout
from tandem import rpc, wire
from tandem.engine.engine import Engine
from tandem.engine.sequence import EngineEvent, Failed, KVWritten, NewToken, Sequence, Started
from tandem.errors import TandemError, TransferFailed
from tandem.v1 import worker_pb2
from tandem.worker.host import Promise, WorkerHost

log = logging.getLogger(__name__)


class PrefillCall:
    """One Prefill call.

        queued ──Started──▶ computing ──chunks──▶ first token told ──▶ rest of the KV sent ──▶ sealed
           │                                            └──▶ it was the last: the transfer is abandoned
           └────────────────── cancel, deadline, failure: everything is freed ◀──┘

    Layers of chunks are sent by a task of their own while later ones are computed, and the first token is told at
    once: it never waits for the transfer.
    """

    def __init__(
        self,
        host: WorkerHost,
        sequence: Sequence,
        events: asyncio.Queue[EngineEvent],
        transport: Transport,
        target: Target,
        context: Any,
        promise: Promise | None = None,
    ) -> None:
        """promise: whose blocks the sequence was lent, when colocated."""
        self._host = host
        self._sequence = sequence
        self._events = events
        self._transport = transport
        self._target = target
        self._context = context
        self._promise = promise
        # Layers and positions whose KV is final, for the sending task; None ends it.
        self._written: asyncio.Queue[tuple[range, range] | None] = asyncio.Queue()
        self._abandoned = False

    async def run(self) -> None:
        async with self._in_engine():
            await rpc.say_counted_from(self._context, self._host.next_heartbeat)
            started = await self._next(Started)
            await self._tell(
                started=worker_pb2.PrefillStarted(queued_ms=started.queued_ms, cached_tokens=started.cached_tokens)
            )
            self._written.put_nowait((range(self._host.engine.fingerprint.num_layers), range(started.cached_tokens)))
            try:
                if self._sequence.request.sampling.max_tokens == 1:
                    await self._compute_only(started.at_s)
                else:
                    await self._compute_and_send(started.at_s)
            except ExceptionGroup as group:
                raise group.exceptions[0] from None

    @asynccontextmanager
    async def _in_engine(self) -> AsyncIterator[None]:
        """The sequence is in the engine while inside; afterwards nothing of it is held here."""
        engine, thread, sequence = self._host.engine, self._host.thread, self._sequence
        handed_over = False
        try:
            await thread.call(lambda: engine.add(sequence))
            yield
            handed_over = sequence.decode_here
        finally:
            if not handed_over:
                # Between steps: the engine may be writing into the blocks this very moment.
                thread.post(lambda: leave_engine(engine, sequence))
                if self._promise is not None:
                    # At once; a lent reservation's lease, which the router renews, is only the backstop.
                    self._promise.failed(TransferFailed("the prefill ended before the handoff"))

    async def _compute_only(self, started_s: float) -> None:
        """Of a single token: nobody will decode, so no KV moves and no transfer begins."""
        await self._tell_first(await self._first_token(), started_s)
        if self._promise is not None:
            self._promise.abandoned()

    async def _compute_and_send(self, started_s: float) -> None:
        table = self._sequence.table
        assert table is not None
        layout = KVLayout.of(self._host.engine.fingerprint)
        source = Source(self._host.engine.cache.pool, table.blocks, layout)
        async with self._transport.open(source, self._target) as sender, asyncio.TaskGroup() as group:
            sending = group.create_task(self._send(sender))
            first = await self._first_token()
            first_s = time.monotonic()
            await self._tell_first(first, started_s)
            if first.finish_reason is not None:
                await self._abandon(sender, sending)
                return
            self._written.put_nowait(None)
            await sending
            summary = await sender.seal(first.token.id, first_s)
            await self._tell(
                sealed=worker_pb2.Sealed(
                    summary=worker_pb2.TransferSummary(
                        bytes=summary.bytes,
                        frames=summary.frames,
                        transfer_ms=summary.seconds * 1000,
                        hidden_ms=summary.hidden_seconds * 1000,
                    ),
                    after_first_token_ms=(time.monotonic() - first_s) * 1000,
                )
            )

    async def _abandon(self, sender: Sender, sending: asyncio.Task[None]) -> None:
        """The client has its answer: what fails from here on concerns nobody, and the decode side is freed anyhow."""
        while not self._written.empty():
            self._written.get_nowait()
        self._written.put_nowait(None)
        self._abandoned = True
        try:
            await sender.abandon()
        except TandemError as error:
            log.info("its transfer was not abandoned cleanly: %s", error)
        await sending

    async def _send(self, sender: Sender) -> None:
        while (written := await self._written.get()) is not None:
            try:
                await sender.send(*written)
            except TandemError:
                if self._abandoned:
                    return
                raise

    async def _first_token(self) -> NewToken:
        while True:
            event = await self._events.get()
            if isinstance(event, NewToken):
                return event
            if isinstance(event, KVWritten):
                self._written.put_nowait((event.layers, range(event.start, event.end)))
            elif isinstance(event, Failed):
                raise event.error

    async def _next(self, kind: type[Started]) -> Started:
        event = await self._events.get()
        if isinstance(event, Failed):
            raise event.error
        assert isinstance(event, kind)
        return event

    async def _tell_first(self, first: NewToken, started_s: float) -> None:
        await self._tell(
            first_token=worker_pb2.FirstToken(
                token=wire.token_to_wire(first.token),
                finish_reason=wire.reason_to_wire(first.finish_reason),
                compute_ms=(time.monotonic() - started_s) * 1000,
            )
        )

    async def _tell(self, **event: Any) -> None:
        await self._context.write(worker_pb2.PrefillEvent(**event))


def leave_engine(engine: Engine, sequence: Sequence) -> None:
    """Between steps: ends a sequence that only prefills, in whatever state, and frees its blocks."""
    engine.abort(sequence)
    if sequence.table is not None:
        sequence.table.release()
