"""Which path of the HTTP door is what."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from router.doors.http import failures
from router.doors.http.answers import AnswerShape, ChatShape, ChoiceProgress, CompletionShape, OpenAIAnswer
from router.doors.http.body import parse, read_body
from router.doors.http.chat_template import ChatTemplate
from router.doors.http.exchange import Exchange
from router.doors.http.failures import entry_of, named_as_sent
from router.doors.http.fields import ChatRequest, CompletionRequest, OpenAIRequest
from router.doors.http.metrics import Metrics
from router.doors.http.probe import ReadinessProbe
from router.doors.http.prompts import Prompt, chat_request, completion_requests, prompts_of
from router.doors.http.token_text import TokenText
from router.life.request import Orchestrator
from router.pool.registry import Registry
from router.tokenizer import Tokenizer
from tandem.config import RouterConfig
from tandem.errors import InvalidRequest, ModelNotFound, TandemError
from tandem.types import ModelInfo
from tandem.v1 import generation_pb2


class OpenAIDoor:
    """The endpoints. No page of documentation, no cross-origin access: what is not here is not found."""

    def __init__(
        self,
        config: RouterConfig,
        orchestrator: Orchestrator,
        registry: Registry,
        tokenizer: Tokenizer | None,
        template: ChatTemplate | None,
    ) -> None:
        self._limit = config.max_message_bytes
        self._orchestrator = orchestrator
        self._registry = registry
        self._tokenizer = tokenizer
        self._spell = None if tokenizer is None else TokenText(tokenizer.backend)
        self._template = template
        self._probe = ReadinessProbe(orchestrator)
        self._metrics = Metrics(orchestrator, registry)
        orchestrator.observers.append(self._metrics)
        self._started = int(time.time())

    def app(self) -> FastAPI:
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
        app.add_exception_handler(TandemError, failures.on_tandem_error)
        app.add_exception_handler(HTTPException, failures.on_http_error)
        app.add_exception_handler(Exception, failures.on_bug)
        routes = APIRouter(default_response_class=Response)
        routes.post("/v1/completions")(self.completions)
        routes.post("/v1/chat/completions")(self.chat)
        # HEAD too: probes ask so.
        get = partial(routes.api_route, methods=["GET", "HEAD"])
        get("/v1/models")(self.models)
        get("/v1/models/{name:path}")(self.one_model)
        get("/health")(self.health)
        get("/ready")(self.ready)
        get("/metrics")(self.metrics)
        app.include_router(routes)
        return app

    async def completions(self, request: Request) -> Response:
        body = parse(CompletionRequest, await self._body(request))
        shape = CompletionShape(self._spell, body.logprobs is not None)
        with named_as_sent(body.names):
            prompts, limit = prompts_of(body), 0
            if body.max_tokens is None:  # what the prompts leave counts
                limit = self._model(body.model).max_model_len
                prompts = [await self._token_ids(prompt, limit) for prompt in prompts]
            return self._exchange(request, body, shape, completion_requests(body, prompts, limit))

    async def chat(self, request: Request) -> Response:
        body = parse(ChatRequest, await self._body(request))
        model = self._model(body.model)
        if self._template is None or self._tokenizer is None:
            lacks = "tokenizer" if self._tokenizer is None else "chat template"
            words = f"model {model.name} has no {lacks} that this server can use: use /v1/completions"
            raise InvalidRequest(words, field="messages")
        # The template writes the special tokens itself.
        text = self._template.render(body.messages)
        shape = ChatShape(self._spell, bool(body.logprobs))
        with named_as_sent(body.names):
            prompt_ids = await self._tokenizer.encode(text, model.max_model_len, add_special_tokens=False)
            return self._exchange(request, body, shape, [chat_request(body, list(prompt_ids), model.max_model_len)])

    async def _body(self, request: Request) -> bytes:
        """Not looked at while no request would be taken in, whatever it is. Raises HTTPMisuse, and as check_limits."""
        data = await read_body(request, self._limit)
        await self._orchestrator.check_limits()
        return data

    async def _token_ids(self, prompt: Prompt, limit: int) -> Prompt:
        """Ids of a text; what is wrong with it is admission's to say."""
        if isinstance(prompt, list) or not prompt or self._tokenizer is None:
            return prompt
        return list(await self._tokenizer.encode(prompt.decode(), limit))

    def _exchange(
        self,
        request: Request,
        body: OpenAIRequest,
        shape: AnswerShape,
        requests: Sequence[generation_pb2.GenerateRequest],
    ) -> Response:
        if body.stream_options is not None and not body.streamed:
            raise InvalidRequest("stream_options needs stream to be true", field="stream_options")
        self._orchestrator.check_size(requests)
        choices = [ChoiceProgress() for request in requests for _ in range(request.n)]
        name = self._model(body.model).name
        entry = entry_of(request.scope)
        answer = OpenAIAnswer(shape, name, entry.request_id, bool(body.return_token_ids), choices)
        return Exchange(self._orchestrator, requests, answer, body, entry)

    def _model(self, name: str | None) -> ModelInfo:
        """Raises ModelNotFound or Unavailable."""
        model = self._registry.served()
        if name and name != model.name:
            raise ModelNotFound(f"model {name[:200]!r} is not served; served: {model.name}", field="model")
        return model

    async def models(self) -> Response:
        model = self._registry.model
        return JSONResponse({"object": "list", "data": [] if model is None else [self._model_object(model)]})

    async def one_model(self, name: str) -> Response:
        if not name:
            raise HTTPException(HTTPStatus.NOT_FOUND)
        return JSONResponse(self._model_object(self._model(name)))

    def _model_object(self, model: ModelInfo) -> dict[str, Any]:
        return {
            "id": model.name,
            "object": "model",
            "created": self._started,
            "owned_by": "tandem",
            "max_model_len": model.max_model_len,
        }

    async def health(self) -> Response:
        """The router's process answers; more is /ready's to say."""
        return JSONResponse({"status": "ok"})

    async def ready(self) -> Response:
        """503 whatever went wrong: the status of the error itself would be about a request of the caller's."""
        try:
            report = (await self._probe.check()).report
        except TandemError as error:
            return JSONResponse(
                failures.object_of(error), HTTPStatus.SERVICE_UNAVAILABLE, failures.retry_headers(error)
            )
        return JSONResponse({"status": "ready", "transport": report.transport, "kv_bytes": report.kv_bytes})

    async def metrics(self) -> Response:
        return Response(self._metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")
