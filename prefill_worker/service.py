"""The prefill role of a worker: computes prompts, samples first tokens, moves the KV to whoever decodes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

import grpc

from kv_transfer.base import Target, Transport
from prefill_worker.call import PrefillCall
from prefill_worker.embedding import embed
from tandem import wire
from tandem.engine.sequence import EngineEvent, Failed, NewToken, Sequence
from tandem.errors import Refused, TransferFailed
from tandem.process import logs
from tandem.types import EngineRequest, Role
from tandem.v1 import registry_pb2, worker_pb2, worker_pb2_grpc
from tandem.worker.host import Promise, WorkerHost

log = logging.getLogger(__name__)

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
        for name, transport in self._transports.items():
            if name != LOCAL:
                load.kv_sent[name].CopyFrom(transport.counters.as_wire())

    @property
    def busy(self) -> bool:
        return self._live > 0

    async def aclose(self) -> None:
        for transport in self._transports.values():
            await transport.aclose()

    async def Prefill(self, message: worker_pb2.PrefillRequest, context: Any) -> None:
        self._host.require(Role.PREFILL)
        logs.about(message.request.request_id)
        self._live += 1
        try:
            prefill = await self._prepare(message, context)
            log.debug("prefill begins: %d tokens", len(message.request.prompt_ids))
            await prefill.run()
            log.debug("prefill is over")
        finally:
            self._live -= 1

    async def Embed(self, message: worker_pb2.EmbedPromptRequest, context: Any) -> worker_pb2.EmbedPromptResponse:
        self._host.require(Role.PREFILL)
        self._live += 1
        try:
            return await embed(self._host, message, context)
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
