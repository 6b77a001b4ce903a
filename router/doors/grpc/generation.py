"""The gRPC front door: the Generation service, which the SDK and the CLI speak."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from typing import Any

import grpc

import tandem
from router.life.request import STALL_S, Live, Orchestrator
from router.life.request_log import ID_HEADER, RequestLog, new_id
from router.pool.registry import Registry
from router.pool.worker import Worker
from tandem.errors import Cancelled
from tandem.types import Event
from tandem.v1 import generation_pb2, generation_pb2_grpc, registry_pb2
from tandem.wire import event_to_wire, model_to_wire

# Entries in one Status answer.
MAX_LISTED_REQUESTS = 100
INTEGRITY_TIMEOUT_S = 5.0


class GenerationService(generation_pb2_grpc.GenerationServicer):
    def __init__(self, orchestrator: Orchestrator, registry: Registry, http_port: int) -> None:
        """http_port: of the other door; 0 when there is none."""
        self._orchestrator = orchestrator
        self._registry = registry
        self._http_port = http_port
        self._started_s = time.monotonic()

    async def Generate(self, request: generation_pb2.GenerateRequest, context: Any) -> None:
        with RequestLog(new_id()) as entry:
            await _identify(entry, context)
            async with aclosing(self._orchestrator.generate(request, context.time_remaining(), entry)) as events:
                async for event in events:
                    await _write(event, context)

    async def Embed(self, request: generation_pb2.EmbedRequest, context: Any) -> generation_pb2.EmbedResponse:
        with RequestLog(new_id()) as entry:
            await _identify(entry, context)
            return await self._orchestrator.embed(request, context.time_remaining(), entry)

    async def ListModels(
        self, _request: generation_pb2.ListModelsRequest, _context: Any
    ) -> generation_pb2.ListModelsResponse:
        return generation_pb2.ListModelsResponse(models=self._models())

    async def Status(self, request: generation_pb2.StatusRequest, _context: Any) -> generation_pb2.StatusResponse:
        # One that is not dialled back yet gets no requests: it does not count as there.
        workers = [worker for worker in self._registry.workers if worker.routable]
        checks = await asyncio.gather(*(_integrity(worker, request.check_integrity) for worker in workers))
        live = self._orchestrator.live
        return generation_pb2.StatusResponse(
            version=tandem.__version__,
            uptime_ms=(time.monotonic() - self._started_s) * 1000,
            live_requests=len(live),
            finished_requests=self._orchestrator.finished,
            failed_requests=self._orchestrator.failed,
            cancelled_requests=self._orchestrator.cancelled,
            workers=[_worker_status(worker, check) for worker, check in zip(workers, checks, strict=True)],
            models=self._models(),
            requests=[_live_request(entry) for entry in live[:MAX_LISTED_REQUESTS]],
            http_port=self._http_port,
        )

    def _models(self) -> list[registry_pb2.ModelInfo]:
        model = self._registry.model
        return [] if model is None else [model_to_wire(model)]


async def _write(event: Event, context: Any) -> None:
    """Raises Cancelled when nobody takes it."""
    try:
        async with asyncio.timeout(STALL_S):
            await context.write(event_to_wire(event))
    except TimeoutError:
        raise Cancelled(f"the client has taken nothing for {STALL_S:g} s") from None
    except grpc.aio.BaseError as error:
        # gRPC's handling of a client that left can reach the write before it cancels this call.
        raise Cancelled("the client left") from error


async def _identify(entry: RequestLog, context: Any) -> None:
    """Takes the client's own id of the request, and gives it back; the trailing metadata has it, or ours. Raises
    InvalidRequest.
    """
    try:
        entry.take_client_id([value for key, value in context.invocation_metadata() or () if key == ID_HEADER])
    finally:
        context.set_trailing_metadata(((ID_HEADER, entry.header_id),))
    if not entry.client_id:
        return  # a message by itself would cost every call a tenth of a millisecond, and Accepted tells ours
    try:
        await context.send_initial_metadata(((ID_HEADER, entry.client_id),))
    except grpc.aio.BaseError as error:
        raise Cancelled("the client left") from error


async def _integrity(worker: Worker, wanted: bool) -> registry_pb2.Integrity | None:
    return await worker.link.check_integrity(INTEGRITY_TIMEOUT_S) if wanted else None


def _worker_status(worker: Worker, check: registry_pb2.Integrity | None) -> generation_pb2.WorkerStatus:
    return generation_pb2.WorkerStatus(
        hello=worker.reported.hello,
        load=worker.load,
        heartbeat_age_ms=(time.monotonic() - worker.reported.at_s) * 1000,
        draining=worker.draining,
        integrity=check,
        cached_blocks=len(worker.reported.prefixes),
    )


def _live_request(live: Live) -> generation_pb2.LiveRequest:
    """Of n choices, the first stands for the request."""
    job = live.jobs[0]
    return generation_pb2.LiveRequest(
        request_id=live.request_id,
        phase=job.phase,
        age_ms=live.timeline.now_ms(),
        prefill_worker=job.prefill_worker,
        decode_worker=job.decode_worker,
    )
