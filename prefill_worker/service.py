"""The prefill role of a worker: computes prompts, samples first tokens, moves the KV to whoever decodes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import grpc

from kv_transfer.base import Sender, Source, Target, Transport
from kv_transfer.layout import KVLayout
from tandem import wire
from tandem.engine.sequence import ChunkDone, EngineEvent, Failed, NewToken, Sequence, Started
from tandem.errors import Refused, TransferFailed
from tandem.types import EngineRequest, Role
from tandem.v1 import registry_pb2, worker_pb2, worker_pb2_grpc
from tandem.worker.host import Promise, WorkerHost

LOCAL = "local"


class PrefillRoom(worker_pb2_grpc.PrefillWorkerServicer):
    """tandem.v1.PrefillWorker."""

    role = Role.PREFILL
    service = "tandem.v1.PrefillWorker"

    def __init__(self, host: WorkerHost, transports: Mapping[str, Transport]) -> None:
        self._host = host
        self._transports = transports
        self._live = 0

    def attach(self, server: grpc.aio.Server) -> None:
        worker_pb2_grpc.add_PrefillWorkerServicer_to_server(self, server)

    def report(self, load: registry_pb2.Load) -> None:
        load.kv_bytes_sent = sum(transport.counters.bytes for transport in self._transports.values())

    @property
    def busy(self) -> bool:
        return self._live > 0

    async def aclose(self) -> None:
        for transport in self._transports.values():
            await transport.aclose()

    async def Prefill(self, message: worker_pb2.PrefillRequest, context: Any) -> None:
        self._host.require(Role.PREFILL)
        self._live += 1
        try:
            prefill = await self._prepare(message, context)
            await prefill.run()
        finally:
            self._live -= 1

    async def _prepare(self, message: worker_pb2.PrefillRequest, context: Any) -> PrefillCall:
        request = await self._host.read(message.request)
        fingerprint = wire.fingerprint_from_wire(message.fingerprint)
        difference = self._host.engine.fingerprint.difference(fingerprint)
        if difference is not None:
            raise Refused(f"the request is for another model or KV layout: {difference}")
        transport = self._transports.get(message.target.transport)
        if transport is None:
            raise Refused(f"this worker has no transport {message.target.transport!r}")
        promise = self._promise(message.target.reservation_id, request) if transport.name == LOCAL else None
        names = await self._host.name_blocks(request) if promise is None else promise.block_names
        target = Target(
            reservation_id=message.target.reservation_id,
            request_id=request.request_id,
            attempt=request.attempt,
            address=message.target.address,
            cached_tokens=message.target.cached_tokens,
            prompt_tokens=len(request.prompt_ids),
            fingerprint=fingerprint,
            deadline_s=context.time_remaining(),
        )
        events: asyncio.Queue[EngineEvent] = asyncio.Queue()
        sequence = Sequence(request, events.put_nowait, decode_here=False, prompt_names=names)
        if promise is not None:
            _lend(sequence, promise, events)
        return PrefillCall(self._host, sequence, events, transport, target, context, promise)

    def _promise(self, reservation_id: str, request: EngineRequest) -> Promise:
        promise = self._host.promises.get(reservation_id)
        if promise is None:
            raise TransferFailed("no such reservation: it never was, or it is over")
        if promise.request != request:
            raise TransferFailed(f"the reservation is not of this request {request.request_id}")
        return promise


def _lend(sequence: Sequence, promise: Promise, events: asyncio.Queue[EngineEvent]) -> None:
    """Colocated: the prompt is computed straight into the blocks that decode reserved, and decoding goes on there.

    The block table changes hands inside the engine, without a copy and without losing a step.
    """

    def listener(event: EngineEvent) -> None:
        later = isinstance(event, NewToken) and event.position > 0
        if not later:
            events.put_nowait(event)
        if later or isinstance(event, Failed):
            promise.listener(event)

    sequence.table, sequence.decode_here, sequence.listener = promise.table, True, listener
    promise.begin(sequence)


class PrefillCall:
    """One Prefill call.

        queued ──Started──▶ computing ──chunks──▶ first token told ──▶ rest of the KV sent ──▶ sealed
           └────────────────── cancel, deadline, failure: everything is freed ◀──┘

    Chunks are sent by a task of their own while later ones are computed, and the first token is told at once: it
    never waits for the transfer.
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
        # Ranges of prompt tokens whose KV is final, for the sending task; None ends it.
        self._ranges: asyncio.Queue[range | None] = asyncio.Queue()

    async def run(self) -> None:
        async with self._in_engine():
            started = await self._next(Started)
            started_s = time.monotonic()
            await self._tell(
                started=worker_pb2.PrefillStarted(queued_ms=started.queued_ms, cached_tokens=started.cached_tokens)
            )
            self._ranges.put_nowait(range(started.cached_tokens))
            try:
                await self._compute_and_send(started_s)
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
                thread.post(lambda: _leave_engine(engine, sequence))
                if self._promise is not None:
                    # At once; a lent reservation's lease, which the router renews, is only the backstop.
                    self._promise.failed(TransferFailed("the prefill ended before the handoff"))

    async def _compute_and_send(self, started_s: float) -> None:
        table = self._sequence.table
        assert table is not None
        layout = KVLayout.of(self._host.engine.fingerprint)
        source = Source(self._host.engine.cache.pool, table.blocks, layout)
        async with self._transport.open(source, self._target) as sender, asyncio.TaskGroup() as group:
            sending = group.create_task(self._send(sender))
            first = await self._first_token()
            first_s = time.monotonic()
            await self._tell(first_token=self._first_message(first, first_s - started_s))
            if first.finish_reason is not None:
                sending.cancel()
                return
            self._ranges.put_nowait(None)
            await sending
            summary = await sender.seal(first.token.id)
            await self._tell(
                sealed=worker_pb2.Sealed(
                    summary=worker_pb2.TransferSummary(
                        bytes=summary.bytes, frames=summary.frames, transfer_ms=summary.seconds * 1000
                    ),
                    after_first_token_ms=(time.monotonic() - first_s) * 1000,
                )
            )

    async def _send(self, sender: Sender) -> None:
        while (tokens := await self._ranges.get()) is not None:
            await sender.send(tokens)

    async def _first_token(self) -> NewToken:
        while True:
            event = await self._events.get()
            if isinstance(event, NewToken):
                return event
            if isinstance(event, ChunkDone):
                self._ranges.put_nowait(range(event.start, event.end))
            elif isinstance(event, Failed):
                raise event.error

    async def _next(self, kind: type[Started]) -> Started:
        event = await self._events.get()
        if isinstance(event, Failed):
            raise event.error
        assert isinstance(event, kind)
        return event

    def _first_message(self, first: NewToken, compute_s: float) -> worker_pb2.FirstToken:
        return worker_pb2.FirstToken(
            token=wire.token_to_wire(first.token),
            finish_reason=wire.reason_to_wire(first.finish_reason),
            compute_ms=compute_s * 1000,
        )

    async def _tell(self, **event: Any) -> None:
        await self._context.write(worker_pb2.PrefillEvent(**event))


def _leave_engine(engine: Any, sequence: Sequence) -> None:
    engine.abort(sequence)
    if sequence.table is not None:
        sequence.table.release()
