"""An OpenAI endpoint whose behaviour a test writes down, on a loop and in a thread of its own."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from own_loop import serving_by

Write = Callable[[bytes], Awaitable[None]]
# Called with the request's body and `write`, which sends bytes of the stream; what it raises breaks the connection.
Script = Callable[[dict[str, Any], Write], Awaitable[None]]


def event(value: Any) -> bytes:
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"


def token(text: str = "a") -> bytes:
    return event({"choices": [{"index": 0, "text": text}]})


def usage(prompt: int, output: int) -> bytes:
    return event({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": output}})


DONE = event(b"[DONE]")


async def two_tokens(body: dict[str, Any], write: Write) -> None:
    await write(token() + token() + usage(len(body["prompt"]), 2) + DONE)


@dataclass
class ScriptedOpenAI:
    script: Script = two_tokens
    # Answers every completion with this status and these words instead.
    refusal: tuple[int, str] | None = None
    models: Any = field(default_factory=lambda: {"data": [{"id": "scripted", "max_model_len": 4096}]})
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response(self.models)

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        self.headers.append(dict(request.headers))
        if self.refusal is not None:
            return web.Response(status=self.refusal[0], text=self.refusal[1])
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        try:
            await self.script(body, response.write)
        except ConnectionAbortedError:
            assert request.transport is not None
            request.transport.abort()
        return response

    async def serve(self, started: threading.Event, stop: asyncio.Event) -> None:
        app = web.Application(client_max_size=1 << 24)
        app.add_routes([web.get("/v1/models", self._models), web.post("/v1/completions", self._complete)])
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.port = runner.addresses[0][1]
        started.set()
        await stop.wait()
        await runner.cleanup()


@contextmanager
def serving(endpoint: ScriptedOpenAI) -> Iterator[ScriptedOpenAI]:
    with serving_by(endpoint.serve):
        yield endpoint
