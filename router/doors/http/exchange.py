"""Requests through the orchestrator, for as long as their client stays."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing

from fastapi import Response
from fastapi.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from router.aio import first_error, first_of
from router.doors.http import failures
from router.doors.http.answers import OpenAIAnswer
from router.doors.http.failures import named_as_sent, stream_event
from router.doors.http.fields import OpenAIRequest
from router.life.request import Orchestrator
from router.life.request_log import RequestLog
from tandem.errors import Cancelled, TandemError
from tandem.types import Accepted, ChoiceFinished, Completed, Delta, Usage
from tandem.v1 import generation_pb2

Requests = Sequence[generation_pb2.GenerateRequest]
# Gets the index of the choice among all of the body's, and what is new of it.
Take = Callable[[int, Delta], Awaitable[None]]
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


async def run_all(
    orchestrator: Orchestrator, requests: Requests, answer: OpenAIAnswer, take: Take, entry: RequestLog
) -> None:
    """All prompts at once; `answer` gets how they ended. The first failure ends the others. Raises a TandemError."""
    usages: list[Usage] = [Usage(0, 0)] * len(requests)
    turn = asyncio.Lock()

    async def run(place: int, request: generation_pb2.GenerateRequest) -> None:
        part = place if len(requests) > 1 else None
        async with aclosing(orchestrator.generate(request, None, entry, part=part)) as events:
            async for event in events:
                match event:
                    case Delta():
                        async with turn:
                            await take(place * request.n + event.choice, event)
                    case ChoiceFinished():
                        answer.finish(place * request.n + event.choice, event)
                    case Completed():
                        usages[place] = event.usage
                    case Accepted():
                        for progress in answer.choices[place * request.n : (place + 1) * request.n]:
                            progress.prompt_tokens = event.prompt_tokens

    with first_error():
        async with asyncio.TaskGroup() as tasks:
            for place, request in enumerate(requests):
                tasks.create_task(run(place, request))
    answer.usages = usages


class Exchange(Response):
    """The answer to one body. A client that leaves cancels its requests, which frees what they hold on both pools.

        running ──first token──▶ streaming ──▶ ended       a stream; a failure is its last event
           └──────────────────────────────────▶ answered    one object, or an error with its own status

    The status line waits for the first token, so a request that is refused, or fails before, gets the right one.
    """

    def __init__(
        self,
        orchestrator: Orchestrator,
        requests: Requests,
        answer: OpenAIAnswer,
        body: OpenAIRequest,
        entry: RequestLog,
    ) -> None:
        """requests: what the body asks of the orchestrator."""
        super().__init__()
        self._orchestrator = orchestrator
        self._requests = requests
        self._answer = answer
        self._body = body
        self._entry = entry
        self._begun = self._ended = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await first_of(self._answer_with(scope, receive, send), _left(receive))
        if not self._ended:
            self._entry.failed(Cancelled("the client left"))

    async def _answer_with(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with named_as_sent(self._body.names):
                if self._body.streamed:
                    await self._stream(send)
                    self._ended = True
                    return
                await run_all(self._orchestrator, self._requests, self._answer, self._note, self._entry)
            response: Response = JSONResponse(self._answer.object())
        except TandemError as error:
            self._entry.failed(error)
            if self._begun:
                await self._break_off(send, error)
                return
            response = failures.response_to(error)
        await response(scope, receive, send)
        self._ended = True

    async def _note(self, index: int, event: Delta) -> None:
        self._answer.note(index, event)

    async def _stream(self, send: Send) -> None:
        async def take(index: int, event: Delta) -> None:
            chunk = self._answer.chunk(index, event)
            if self._body.usage_in_stream:
                chunk["usage"] = self._answer.usage_so_far(index) if self._body.usage_in_chunks else None
            if not self._begun:
                self._begun = True
                await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
            await send({"type": "http.response.body", "body": stream_event(chunk), "more_body": True})

        await run_all(self._orchestrator, self._requests, self._answer, take, self._entry)
        last = stream_event(self._answer.usage_chunk()) if self._body.usage_in_stream else b""
        await send({"type": "http.response.body", "body": last + b"data: [DONE]\n\n", "more_body": False})

    async def _break_off(self, send: Send, error: TandemError) -> None:
        body = stream_event(failures.object_of(error))
        await send({"type": "http.response.body", "body": body, "more_body": False})


async def _left(receive: Receive) -> None:
    """Returns when the client has gone; the body was read before."""
    while (await receive())["type"] != "http.disconnect":
        pass
