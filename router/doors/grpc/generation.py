"""The gRPC front door: the Generation service, which the SDK and the CLI speak."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import grpc

from router.doors.grpc.status import StatusReport
from router.life.request import STALL_S, Orchestrator
from router.life.request_log import ID_HEADER, RequestLog, new_id
from tandem.errors import Cancelled
from tandem.types import Event
from tandem.v1 import generation_pb2, generation_pb2_grpc
from tandem.wire import event_to_wire


class GenerationService(generation_pb2_grpc.GenerationServicer):
    def __init__(self, orchestrator: Orchestrator, report: StatusReport) -> None:
        self._orchestrator = orchestrator
        self._report = report

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
        return generation_pb2.ListModelsResponse(models=self._report.models())

    async def Status(self, request: generation_pb2.StatusRequest, _context: Any) -> generation_pb2.StatusResponse:
        return await self._report.now(request.check_integrity)


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
