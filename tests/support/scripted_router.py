"""A Generation service whose behaviour a test writes down: the SDK's and the CLI's stand-in for a router."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from own_loop import serving_by

from tandem import rpc, wire
from tandem.timeline import Phase, Timeline
from tandem.types import Accepted, ChoiceFinished, Completed, Delta, Event, FinishReason, RequestReport, Token, Usage
from tandem.v1 import generation_pb2, generation_pb2_grpc

# Called with the request and `emit`; what it raises ends the call.
Script = Callable[[generation_pb2.GenerateRequest, Callable[[Event], Awaitable[None]]], Awaitable[None]]

REPORT = RequestReport(
    timeline=Timeline(
        {
            Phase.RECEIVED: 0.0,
            Phase.ADMITTED: 0.5,
            Phase.RESERVED: 1.0,
            Phase.PREFILL_STARTED: 2.0,
            Phase.FIRST_TOKEN: 12.0,
            Phase.KV_SEALED: 14.0,
            Phase.DECODE_STARTED: 15.0,
            Phase.FINISHED: 25.0,
        }
    ),
    kv_bytes=4096,
    kv_frames=2,
    transport="grpc",
    prefill_worker="prefill-a",
    decode_worker="decode-b",
)


async def two_tokens(request: generation_pb2.GenerateRequest, emit: Callable[[Event], Awaitable[None]]) -> None:
    """Answers " can vary" for every choice, as if "!" was to end it."""
    await emit(Accepted("request-1", 5))
    for choice in range(request.n):
        await emit(Delta(choice, (Token(7),), " can"))
        await emit(Delta(choice, (Token(8),), " vary", FinishReason.STOP, "!"))
        await emit(ChoiceFinished(choice, FinishReason.STOP, 2, REPORT, "!"))
    await emit(Completed(Usage(5, 2 * request.n)))


@dataclass
class ScriptedRouter(generation_pb2_grpc.GenerationServicer):
    script: Script = two_tokens
    status: generation_pb2.StatusResponse = field(default_factory=generation_pb2.StatusResponse)
    requests: list[generation_pb2.GenerateRequest] = field(default_factory=list)
    # Seconds that the caller allowed for each request.
    time_left_s: list[float | None] = field(default_factory=list)
    # Set when a call was cancelled by its caller.
    cancelled: threading.Event = field(default_factory=threading.Event)
    port: int = 0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def Generate(self, request: generation_pb2.GenerateRequest, context: Any) -> None:
        self.requests.append(request)
        self.time_left_s.append(context.time_remaining())

        async def emit(event: Event) -> None:
            await context.write(wire.event_to_wire(event))

        try:
            await self.script(request, emit)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def Status(self, request: generation_pb2.StatusRequest, context: Any) -> Any:
        return self.status

    async def ListModels(self, request: generation_pb2.ListModelsRequest, context: Any) -> Any:
        return generation_pb2.ListModelsResponse(models=self.status.models)

    async def serve(self, started: threading.Event, stop: asyncio.Event) -> None:
        server = rpc.make_server()
        generation_pb2_grpc.add_GenerationServicer_to_server(self, server)
        self.port = rpc.bind(server, "127.0.0.1", 0)
        await server.start()
        started.set()
        await stop.wait()
        await server.stop(0)


@contextmanager
def serving(router: ScriptedRouter) -> Iterator[ScriptedRouter]:
    with serving_by(router.serve):
        yield router
