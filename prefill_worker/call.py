"""One Prefill call, from the queue to the seal."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from kv_transfer.base import Sender, Source, TransferTarget, Transport
from kv_transfer.frames.layout import KVLayout
from tandem import rpc, wire
from tandem.engine.engine import Engine
from tandem.engine.sequence import EngineEvent, Failed, KVWritten, NewToken, Sequence, Started
from tandem.errors import TandemError, TransferFailed
from tandem.v1 import worker_pb2
from tandem.worker.host import WorkerHost
from tandem.worker.local_reservation import LocalReservation

log = logging.getLogger(__name__)


class PrefillCall:
    """One Prefill call.

        queued ──Started──▶ computing ──chunks──▶ first token reported ──▶ rest of the KV sent ──▶ sealed
           │                                            └──▶ it was the last: the transfer is abandoned
           └────────────────── cancel, deadline, failure: everything is freed ◀──┘

    Layers of chunks are sent by a task of their own while later ones are computed, and the first token is reported at
    once: it never waits for the transfer.
    """

    def __init__(
        self,
        host: WorkerHost,
        sequence: Sequence,
        events: asyncio.Queue[EngineEvent],
        transport: Transport,
        target: TransferTarget,
        context: Any,
        reservation: LocalReservation | None = None,
    ) -> None:
        """reservation: what lent the sequence its blocks, when colocated."""
        self._host = host
        self._sequence = sequence
        self._events = events
        self._transport = transport
        self._target = target
        self._context = context
        self._reservation = reservation
        # Layers and positions whose KV is final, for the sending task; None ends it.
        self._written: asyncio.Queue[tuple[range, range] | None] = asyncio.Queue()
        self._abandoned = False

    async def run(self) -> None:
        """Until the seal, or a first token that is the last. Raises what ends it before: nothing is held then."""
        try:
            async with in_engine(self._host, self._sequence, self._context):
                started = await self._next_event()
                assert isinstance(started, Started)
                await self._report(
                    started=worker_pb2.PrefillStarted(queued_ms=started.queued_ms, cached_tokens=started.cached_tokens)
                )
                if self._sequence.request.sampling.max_tokens > 1:
                    await self._compute_and_send(started)
                    return
                # Nobody will decode a single token: no KV moves and no transfer begins.
                await self._report_first(await self._first_token(), started)
                if self._reservation is not None:
                    self._reservation.abandoned()
        except BaseException:
            if self._reservation is not None:
                # At once; a lent reservation's lease, which the router renews, is only the backstop.
                self._reservation.failed(TransferFailed("the prefill ended before the handoff"))
            raise

    async def _compute_and_send(self, started: Started) -> None:
        table, fingerprint = self._sequence.table, self._host.engine.fingerprint
        assert table is not None
        source = Source(self._host.engine.cache.pool, table.blocks, KVLayout.of(fingerprint))
        self._written.put_nowait((range(fingerprint.num_layers), range(started.cached_tokens)))
        async with self._transport.open(source, self._target) as sender:
            try:
                async with asyncio.TaskGroup() as group:
                    sending = group.create_task(self._send(sender))
                    first = await self._first_token()
                    first_s = time.monotonic()
                    await self._report_first(first, started)
                    if first.finish_reason is not None:
                        await self._abandon(sender, sending)
                    else:
                        self._written.put_nowait(None)
                        await sending
                        await self._seal(sender, first.token.id, first_s)
            except ExceptionGroup as failures:
                raise failures.exceptions[0] from None

    async def _seal(self, sender: Sender, first_token: int, first_s: float) -> None:
        summary = await sender.seal(first_token, first_s)
        await self._report(
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
        while not isinstance(event := await self._next_event(), NewToken):
            assert isinstance(event, KVWritten)
            self._written.put_nowait((event.layers, range(event.start, event.end)))
        return event

    async def _next_event(self) -> EngineEvent:
        event = await self._events.get()
        if isinstance(event, Failed):
            raise event.error
        return event

    async def _report_first(self, first: NewToken, started: Started) -> None:
        await self._report(
            first_token=worker_pb2.FirstToken(
                token=wire.token_to_wire(first.token),
                finish_reason=wire.reason_to_wire(first.finish_reason),
                compute_ms=(time.monotonic() - started.at_s) * 1000,
            )
        )

    async def _report(self, **event: Any) -> None:
        await self._context.write(worker_pb2.PrefillEvent(**event))


@asynccontextmanager
async def in_engine(host: WorkerHost, sequence: Sequence, context: Any) -> AsyncIterator[None]:
    """The sequence is in the engine while inside; afterwards nothing of it is held here, unless it goes on decoding.

    The caller is told which heartbeat counts it first.
    """
    goes_on = False
    try:
        await host.thread.call(partial(host.engine.add, sequence))
        await rpc.say_counted_from(context, host.next_heartbeat)
        yield
        goes_on = sequence.decode_here
    finally:
        if not goes_on:
            # Between steps: the engine may be writing into the blocks this very moment.
            host.thread.post(partial(_leave, host.engine, sequence))


def _leave(engine: Engine, sequence: Sequence) -> None:
    engine.abort(sequence)
    if sequence.table is not None:
        sequence.table.release()
