"""What a load test asks of a service, and how it counts one that fails."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import pytest
import scripted_openai
from paced_service import FAST, Scripted, address_of, joined, make_target, measured
from scripted_openai import ScriptedOpenAI
from scripted_router import ScriptedRouter, serving

from loadtest.runner import Arrival, Runner
from loadtest.schedule.plan import Plan
from loadtest.schedule.workloads import Lengths, Vocabulary, random_requests
from loadtest.session import Measuring
from loadtest.targets.openai import OpenAITarget
from loadtest.targets.target import LoadTarget, SendOptions
from tandem.errors import ConfigError, ModelNotFound, Overloaded, Refused, TandemError, Unavailable


async def fails_with(target: LoadTarget) -> str | None:
    """The kind by which all of three requests fail."""
    schedule = [Arrival(0.0, request) for request in random_requests(3, Lengths(5, 2), Vocabulary(100, 0))]
    run = await Runner(target, schedule, None).send_all(asyncio.Event())
    await target.close()
    (kind,) = {outcome.failure for outcome in run.outcomes}
    assert all(outcome.error for outcome in run.outcomes)
    assert run.failed == run.ended == 3
    return kind


async def broken(body: dict[str, Any], write: scripted_openai.Write) -> None:
    await write(scripted_openai.token())
    raise ConnectionAbortedError


def writes(*parts: bytes) -> scripted_openai.Script:
    async def script(body: dict[str, Any], write: scripted_openai.Write) -> None:
        for part in parts:
            await write(part)

    return script


async def silent(*_: Any) -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("script", "kind"),
    [
        (broken, "connection"),
        (writes(scripted_openai.token()), "truncated"),
        (writes(scripted_openai.DONE), "no_tokens"),
        (writes(b"data: what\n\n"), "bad_stream"),
        (writes(b"data: 5\n\n"), "bad_stream"),
        (writes(scripted_openai.event(b"[" * 100_000)), "bad_stream"),
        (writes(scripted_openai.token(), scripted_openai.usage(1, 10**300)), "bad_stream"),
        (writes(scripted_openai.event({"choices": [], "usage": 5}), scripted_openai.DONE), "bad_stream"),
        (writes(scripted_openai.token(), scripted_openai.event({"error": {"message": "no"}})), "error_event"),
        (silent, "deadline_exceeded"),
    ],
)
async def test_failures_of_an_endpoint_have_kinds(script: scripted_openai.Script, kind: str) -> None:
    with scripted_openai.serving(ScriptedOpenAI(script)) as endpoint:
        assert await fails_with(make_target("openai", endpoint.url, timeout_s=0.5)) == kind


async def test_a_refusal_is_counted_by_its_status() -> None:
    with scripted_openai.serving(ScriptedOpenAI(refusal=(503, "busy"))) as endpoint:
        assert await fails_with(make_target("openai", endpoint.url)) == "http_503"
    assert await fails_with(make_target("openai", endpoint.url)) == "connection"


async def test_failures_of_a_router_have_the_codes_of_its_errors() -> None:
    async def refuse(request: Any, emit: Any) -> None:
        raise Overloaded("full")

    for script, kind in ((refuse, "overloaded"), (silent, "deadline_exceeded")):
        with serving(ScriptedRouter(script, joined())) as router:
            assert await fails_with(make_target("grpc", router.address, timeout_s=0.5)) == kind
    assert await fails_with(make_target("grpc", "127.0.0.1:1")) == "unavailable"


async def test_what_an_endpoint_is_asked() -> None:
    with scripted_openai.serving(ScriptedOpenAI()) as endpoint:
        target = OpenAITarget(endpoint.url + "/v1/", SendOptions(), api_key="secret")
        result = await measured(target, Plan(num_prompts=1, lengths=Lengths(3, 2), vocab_size=1))
        await target.close()
    assert endpoint.requests == [
        {
            "model": "scripted",
            "prompt": [0, 0, 0],
            "max_tokens": 2,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        }
    ]
    assert endpoint.headers[0]["Authorization"] == "Bearer secret"
    assert result.figures["model_id"] == "scripted"


@pytest.mark.parametrize(
    ("models", "error"),
    [({"data": []}, ModelNotFound), ({}, Refused), ({"data": [{"id": 5}]}, ModelNotFound), ([], Refused)],
)
async def test_an_endpoint_without_a_model_is_named(models: Any, error: type[TandemError]) -> None:
    with scripted_openai.serving(ScriptedOpenAI(models=models)) as endpoint:
        target = make_target("openai", endpoint.url)
        with pytest.raises(error):
            await target.describe()
        await target.close()


@pytest.mark.parametrize(
    ("kind", "address", "words"),
    [
        ("grpc", "127.0.0.1:1", "cannot reach"),
        (
            "openai",
            "http://127.0.0.1:1",
            "an OpenAI endpoint at http://127.0.0.1:1: Connection refused$",
        ),
        ("openai", "http://localhost:1", "http://localhost:1: Connection refused$"),
        ("openai", "http://no-such-host.invalid:1", "cannot reach .*no-such-host.invalid:1: "),
    ],
)
async def test_nobody_there(kind: str, address: str, words: str) -> None:
    target = make_target(kind, address)
    with pytest.raises(Unavailable, match=words) as caught:
        await target.describe()
    assert "ssl:" not in caught.value.message
    await target.close()


@pytest.mark.parametrize("url", ["http://nonsense:port", "http://a b", "http://exa\x00mple", f"http://{'ü' * 99}"])
async def test_what_is_no_url_is_a_wrong_option(url: str) -> None:
    async def ask() -> None:
        target = make_target("openai", url)
        try:
            await target.describe()
        finally:
            await target.close()

    with pytest.raises(ConfigError, match="--openai"):
        await ask()


async def test_an_endpoint_that_speaks_no_tls_is_said_so() -> None:
    with scripted_openai.serving(ScriptedOpenAI()) as endpoint:
        target = make_target("openai", endpoint.url.replace("http:", "https:"))
        with pytest.raises(Unavailable, match=r"it does not speak TLS .*; is it http://\?$"):
            await target.describe()
        await target.close()


async def test_a_mistake_of_ours_is_not_taken_for_bad_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """aiohttp's ValueErrors are of what it was given."""

    def wrong(*_: Any, **__: Any) -> Any:
        raise ValueError("not JSON's")

    with scripted_openai.serving(ScriptedOpenAI()) as endpoint:
        target = make_target("openai", endpoint.url)
        monkeypatch.setattr(aiohttp.ClientSession, "get", wrong)
        with pytest.raises(ValueError, match="not JSON's"):
            await target.describe()
        await target.close()


async def test_a_port_that_speaks_no_http_is_said_so() -> None:
    with address_of("grpc", Scripted([FAST])) as address:
        target = make_target("openai", f"http://{address}")
        with pytest.raises(Unavailable, match="what it answers is not HTTP"):
            await target.describe()
        await target.close()


async def test_a_warm_up_that_fails_ends_the_run() -> None:
    with scripted_openai.serving(ScriptedOpenAI(refusal=(400, "no"))) as endpoint:
        target = make_target("openai", endpoint.url)
        with pytest.raises(Unavailable, match="http_400: no"):
            await measured(target, Plan(num_prompts=5, lengths=Lengths(5, 2)), Measuring(num_warmups=2))
        await target.close()
