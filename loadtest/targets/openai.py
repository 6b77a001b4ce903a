"""Any OpenAI-compatible endpoint: POST /v1/completions, streamed, with usage."""

from __future__ import annotations

import json
import time
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from loadtest.metrics import Outcome
from loadtest.schedule.workloads import LoadRequest
from loadtest.targets.http_words import said_by, what_broke
from loadtest.targets.sse import EventSplitter, Malformed
from loadtest.targets.target import SendOptions, Served
from tandem.errors import ConfigError, ModelNotFound, Refused, Unavailable
from tandem.types import shown

MAX_BODY_BYTES = 1 << 20
DESCRIBE_TIMEOUT_S = 10.0
# Tokens of one answer, above which a count is none.
MAX_COUNT = 1 << 31
# What says that the transport failed, not the endpoint.
_BROKEN = (aiohttp.ClientError, OSError)


def check_url(url: str) -> None:
    """Raises ConfigError, saying what is wrong, unless it is one of an HTTP server."""
    if problem := _problem_of(url):
        words = f"--openai takes a URL such as http://host:8000, not {shown(url)}: {problem}"
        raise ConfigError(words, field="openai")


def _problem_of(url: str) -> str | None:
    if not url.startswith(("http://", "https://")):
        return "it begins with neither http:// nor https://"
    if not url.isprintable() or " " in url:
        return "it holds a blank or a control character"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:  # a port that is none, brackets without an address
        return str(error)[:1].lower() + str(error)[1:]
    if not parts.hostname:
        return "it names no host"
    return "nobody listens on port 0" if port == 0 else None


def check_key(key: str | None, url: str) -> None:
    """Raises ConfigError for a key that no request could carry. Its words hold nothing of the key."""
    if key and not key.isprintable():
        words = "holds a line end or another character that cannot be sent"
        raise ConfigError(f"--api-key (or OPENAI_API_KEY) {words}", field="api_key")
    if key and urlsplit(url).username is not None:
        words = "and the URL of --openai has a user name: a request can carry one of them"
        raise ConfigError(f"--api-key (or OPENAI_API_KEY) is given, {words}", field="api_key")


class _Failed(Exception):
    """An answer that is none: the kind to count it by, and words."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class OpenAITarget:
    backend = "openai"

    def __init__(self, base_url: str, options: SendOptions, api_key: str | None = None) -> None:
        """`base_url` is http://HOST:PORT, with or without /v1. Needs a running loop. Raises ConfigError."""
        check_url(base_url)
        check_key(api_key, base_url)
        self._base = base_url.rstrip("/").removesuffix("/v1")
        self._options = options
        self._model = options.model
        self._session = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else None,
            timeout=aiohttp.ClientTimeout(total=options.timeout_s),
            # No limit: a request that waits for a free connection would close the loop. And an idle one is given up
            # before servers do it (uvicorn after 5 s), or a request would now and then meet a closing one and fail.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2),
        )

    async def describe(self) -> Served:
        models = await self._models()
        found = next((model for model in models if self._options.model in ("", model["id"])), None)
        if found is None:
            wanted = f"a model {self._options.model}" if self._options.model else "any model"
            raise ModelNotFound(f"{self._base} does not serve {wanted}")
        self._model = found["id"]
        longest = found.get("max_model_len")  # vLLM's extension
        return Served(self._model, max_model_len=longest if isinstance(longest, int) else None)

    async def _models(self) -> list[dict[str, Any]]:
        timeout = aiohttp.ClientTimeout(total=DESCRIBE_TIMEOUT_S)
        try:
            async with self._session.get(f"{self._base}/v1/models", timeout=timeout) as response:
                body = await _body(response)
        except aiohttp.InvalidURL:
            raise ConfigError(f"--openai: {self._base} is no URL that can be asked", field="openai") from None
        except (*_BROKEN, TimeoutError) as error:
            raise Unavailable(f"cannot reach an OpenAI endpoint at {self._base}: {what_broke(error)}") from None
        if response.status != 200:
            raise Refused(f"{self._base}/v1/models answered {response.status}: {said_by(body)}")
        try:
            return [model for model in _from_json(body)["data"] if isinstance(model["id"], str)]
        except (Malformed, TypeError, KeyError):
            raise Refused(f"{self._base}/v1/models did not answer with a list of models") from None

    async def send_request(self, request: LoadRequest, outcome: Outcome) -> None:
        outcome.sent_s = time.perf_counter()
        try:
            await self._stream(request, outcome)
        except _Failed as failed:
            outcome.set_failure(failed.kind, str(failed))
        except TimeoutError:
            outcome.set_failure("deadline_exceeded", f"no whole answer within {self._options.timeout_s:g} s")
        except _BROKEN as error:
            outcome.set_failure("connection", what_broke(error))
        except Malformed as error:
            outcome.set_failure("bad_stream", f"not the stream of an OpenAI endpoint: {error}")

    def _payload(self, request: LoadRequest) -> dict[str, Any]:
        payload: dict[str, Any] = {
            "model": self._model,
            "prompt": request.prompt_ids.tolist(),
            "max_tokens": request.output_tokens,
            "temperature": self._options.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        # Not OpenAI's own; vLLM and Tandem know them.
        if self._options.ignore_eos:
            payload["ignore_eos"] = True
        if self._options.cache_salt:
            payload["cache_salt"] = self._options.cache_salt
        return payload

    async def _stream(self, request: LoadRequest, outcome: Outcome) -> None:
        """Raises _Failed, Malformed, and what aiohttp raises."""
        url = f"{self._base}/v1/completions"
        async with self._session.post(url, json=self._payload(request)) as response:
            if response.status != 200:
                body = await _body(response)
                raise _Failed(f"http_{response.status}", said_by(body))
            splitter = EventSplitter()
            async for chunk in response.content.iter_any():
                for data in splitter.feed(chunk):
                    if data == b"[DONE]":
                        return
                    _take(_from_json(data), outcome)
        raise _Failed("truncated", "the stream ended before [DONE]")

    async def close(self) -> None:
        await self._session.close()


def _from_json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:  # the second where it is nested too deeply
        raise Malformed(shown(str(error))) from None


def _take(event: Any, outcome: Outcome) -> None:
    """One event of the stream: an arrival if it has a choice, even one without text, as vLLM counts."""
    if not isinstance(event, dict):
        raise Malformed("an event that is no object")
    if event.get("error"):
        raise _Failed("error_event", shown(event["error"]))
    if event.get("choices"):
        outcome.arrivals_s.append(time.perf_counter())
    if usage := event.get("usage"):
        outcome.prompt_tokens, outcome.counted_tokens = (
            _count(usage, "prompt_tokens"),
            _count(usage, "completion_tokens"),
        )


def _count(usage: Any, key: str) -> int:
    count = usage.get(key) if isinstance(usage, dict) else None
    if not isinstance(count, int) or not 0 <= count <= MAX_COUNT:
        raise Malformed(f"usage without {key}")
    return count


async def _body(response: aiohttp.ClientResponse) -> bytes:
    body = b""
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            break
    return body[:MAX_BODY_BYTES]
