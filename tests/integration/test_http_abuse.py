"""Clients that send nonsense, too much, too slowly, or nothing, and those that never read: all are bounded."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from http_house import HttpHouse, http_configuration, open_http_house
from router_house import eventually_status
from scripted_worker import ScriptedWorker

from tandem import errors
from tandem.config import TINY_MODEL

LIMIT = 64 << 10


@pytest.fixture
async def door() -> AsyncIterator[HttpHouse]:
    async with open_http_house(http_configuration(max_message_bytes=LIMIT, max_live_requests=8)) as door:
        await door.house.join("c1")
        yield door
        await door.house.check_empty()


def error_of(response: httpx.Response) -> dict[str, Any]:
    """Every error has OpenAI's shape."""
    body: dict[str, Any] = response.json()
    assert list(body) == ["error"]
    assert sorted(body["error"]) == ["code", "message", "param", "type"]
    found: dict[str, Any] = body["error"]
    return found


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (b"", None, "the body is not JSON: EOF"),
        (b"{", None, "the body is not JSON: EOF"),
        (b'{"prompt": "x",}', None, "the body is not JSON: trailing comma"),
        (b'{"prompt": "\xff"}', None, "the body is not JSON: invalid unicode code point"),
        (b'{"prompt": "\\ud800"}', None, "the body is not JSON: "),
        (b"[" * 60_000, None, "the body is not JSON: recursion limit exceeded"),
        (b'{"prompt":' * 6_000, None, "the body is not JSON: recursion limit exceeded"),
        (b"[1]", None, "the body must be a JSON object"),
        (b"null", None, "the body must be a JSON object"),
        (b"{}", "prompt", "prompt is missing"),
        (b'{"prompt": 5}', "prompt", "prompt must be a string, a list of strings"),
        (b'{"prompt": []}', "prompt", "the prompt is empty"),
        (b'{"prompt": [[]]}', "prompt", "the prompt is empty"),
        (b'{"prompt": [-1]}', "prompt", "token ids in [0, 2^32), not -1"),
        (b'{"prompt": ["a", 1]}', "prompt", "prompt must be a string, a list of strings"),
        (b'{"prompt": "x", "max_tokens": "5"}', "max_tokens", "max_tokens must be a valid integer, not '5'"),
        (b'{"prompt": "x", "max_tokens": 1e400}', "max_tokens", "max_tokens must be"),
        (b'{"prompt": "x", "max_tokens": -1}', "max_tokens", "max_tokens must be 1 or more, not -1"),
        (b'{"prompt": "x", "temperature": NaN}', "temperature", "temperature must be in [0, 100], not nan"),
        (b'{"prompt": "x", "n": 99}', "n", "n must be less than or equal to 32, not 99"),
        (b'{"prompt": "x", "stream": 1}', "stream", "stream must be a valid boolean, not 1"),
        (b'{"prompt": "x", "stop": [""]}', "stop", "a stop string must not be empty"),
        (b'{"prompt": "x", "stop": [7]}', "stop[0]", "stop[0] must be a valid string, not 7"),
        (b'{"prompt": "x", "logit_bias": {"a": 1}}', "logit_bias", "keyed by token ids, not 'a'"),
        (b'{"prompt": "x", "logprobs": 21}', "logprobs", "logprobs must be in [0, 20], not 21"),
        (b'{"prompt": "x", "seed": 18446744073709551616}', "seed", "seed must be in [0, 2^64)"),
        (b'{"prompt": "x", "temprature": 1}', "temprature", "no field of this request; did you mean temperature?"),
        (b'{"prompt": "x", "echo": true}', "echo", "echo is not supported by this server (its value was True)"),
        (b'{"prompt": "x", "stream_options": {}}', "stream_options", "stream_options needs stream to be true"),
        (
            b'{"prompt": "x", "stream": true, "stream_options": {"include_obfuscation": true}}',
            "stream_options.include_obfuscation",
            "stream_options.include_obfuscation is not supported",
        ),
    ],
)
async def test_a_bad_body_is_told_what_is_wrong(door: HttpHouse, body: bytes, param: str | None, words: str) -> None:
    response = await door.post(body)
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert (error["type"], error["param"]) == ("invalid_request_error", param), error
    assert words in error["message"]
    assert len(error["message"]) < 400


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": []}, "messages", "messages must hold at least 1 entries"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "messages[0].role must be"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "messages[0].content is missing"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content",
            "messages[0].content must be a string or a list of text parts",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": []}]},
            "messages[0].tool_calls",
            "messages[0].tool_calls is not supported",
        ),
        ({"tools": [{"type": "function"}]}, "tools", "tools is not supported by this server"),
        ({"response_format": {"type": "json_object"}}, "response_format", "response_format is not supported"),
        ({"top_logprobs": 2}, "top_logprobs", "top_logprobs needs logprobs to be true"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens", "say one of them"),
    ],
)
async def test_a_bad_conversation_is_told_what_is_wrong(
    door: HttpHouse, fields: dict[str, Any], param: str, words: str
) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "x"}], **fields}).encode()
    response = await door.post(body, "/v1/chat/completions")
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert error["param"] == param, error
    assert words in error["message"]


async def test_what_asks_for_nothing_is_taken(door: HttpHouse) -> None:
    neutral = {"best_of": 1, "echo": False, "suffix": None, "user": "u", "tools": None, "logprobs": None, "n": None}
    response = await door.complete(**neutral)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
        ("GET", "/v1/completions", 405),
        ("OPTIONS", "/v1/completions", 405),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/models/none", 404),
    ],
)
async def test_what_is_not_there(door: HttpHouse, method: str, path: str, status: int) -> None:
    response = await door.client.request(method, path, headers={"origin": "http://evil.example"})
    assert response.status_code == status
    assert error_of(response)["type"] == "invalid_request_error"
    assert not [name for name in response.headers if name.startswith("access-control")]
    assert "server" not in response.headers


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
async def test_a_page_in_a_browser_cannot_send_requests_unasked(door: HttpHouse, kind: str) -> None:
    response = await door.client.post("/v1/completions", content=b'{"prompt": "x"}', headers={"content-type": kind})
    assert response.status_code == 415
    assert "application/json" in error_of(response)["message"]


async def pieces(count: int) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield b" " * (32 << 10)


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_huge_body_is_refused(door: HttpHouse, chunked: bool) -> None:
    content: Any = pieces(200) if chunked else b" " * (6 << 20)
    response = await door.client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 413
    assert f"more than {LIMIT} bytes" in error_of(response)["message"]
    assert (await door.complete()).status_code == 200


async def test_a_body_that_says_it_is_endless_is_not_read(door: HttpHouse) -> None:
    raw = door.dial()
    loop = asyncio.get_running_loop()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    await loop.sock_sendall(raw, head % 10**15)
    assert (await read_all(raw)).startswith(b"HTTP/1.1 413 ")


async def read_all(raw: Any, within_s: float = 10) -> bytes:
    """Until the other side closes."""
    received = b""
    async with asyncio.timeout(within_s):
        with raw:
            while data := await asyncio.get_running_loop().sock_recv(raw, 1 << 16):
                received += data
    return received


async def test_a_body_that_does_not_arrive(door: HttpHouse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.http.body.READ_S", 0.2)
    raw = door.dial()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 20\r\n\r\n{"
    await asyncio.get_running_loop().sock_sendall(raw, head)
    answer = await read_all(raw)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"did not arrive within 0.2 s" in answer


@pytest.mark.parametrize("beginning", [b"", b"POST /v1/comp", b"GET /health HTTP/1.1\r\nhost: x\r\nx-slow: "])
async def test_headers_that_do_not_arrive(door: HttpHouse, monkeypatch: pytest.MonkeyPatch, beginning: bytes) -> None:
    monkeypatch.setattr("router.http.door.HEADERS_S", 0.2)
    raw = door.dial()
    await asyncio.get_running_loop().sock_sendall(raw, beginning)
    assert await outcome(raw) == b""


async def test_headers_of_a_second_request_that_do_not_arrive(door: HttpHouse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.http.door.HEADERS_S", 0.3)
    raw, loop = door.dial(), asyncio.get_running_loop()
    await loop.sock_sendall(raw, b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
    assert b'{"status":"ok"}' in await loop.sock_recv(raw, 1 << 16)
    await loop.sock_sendall(raw, b"GET /hea")
    assert await outcome(raw, 4) == b"", "sooner than an idle connection ends"


async def test_bytes_that_are_no_http(door: HttpHouse) -> None:
    raw = door.dial()
    await asyncio.get_running_loop().sock_sendall(raw, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n")
    assert (await read_all(raw)).startswith(b"HTTP/1.1 400 ")


async def test_a_thousand_connections_that_never_send(door: HttpHouse, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those above the limit are turned away, the others time out, and a request that comes meanwhile is served."""
    monkeypatch.setattr("router.http.door.HEADERS_S", 2.0)
    assert (await door.complete()).status_code == 200  # its connection stays
    idle = [door.dial() for _ in range(1000)]
    async with asyncio.TaskGroup() as tasks:
        reads = [tasks.create_task(outcome(raw)) for raw in idle]
        assert (await door.complete()).status_code == 200
    answers = [read.result() for read in reads]
    turned_away = sum(answer.startswith(b"HTTP/1.1 503 ") for answer in answers)
    assert turned_away == 1000 + 1 - (8 + 512)
    assert answers.count(b"") == 1000 - turned_away
    assert (await door.complete()).status_code == 200


async def outcome(raw: Any, within_s: float = 20) -> bytes:
    try:
        return await read_all(raw, within_s)
    except ConnectionResetError:
        return b""


def stream_request(max_tokens: int) -> bytes:
    # Log probabilities make each event large, and so the buffers on the way full.
    fields = {"prompt": [1, 2, 3], "max_tokens": max_tokens, "stream": True, "logprobs": 20, "ignore_eos": True}
    body = json.dumps(fields).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


async def test_clients_that_never_read_are_cancelled(door: HttpHouse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.http.door.STALL_S", 0.5)
    door.house.cluster.top_logprobs = 100
    with ExitStack() as stack:
        for _ in range(5):
            raw = stack.enter_context(door.dial(4096))
            await asyncio.get_running_loop().sock_sendall(raw, stream_request(400))
        await door.house.cluster.saw("first", 5)
        assert (await door.house.status()).live_requests == 5
        assert (await door.complete()).status_code == 200
        await door.house.check_empty()
    status = await door.house.status()
    assert (status.cancelled_requests, status.finished_requests) == (5, 1)


async def test_a_thousand_connections_that_ask_and_never_read(door: HttpHouse, monkeypatch: pytest.MonkeyPatch) -> None:
    """A house for 8 takes 8 of them; they are cut off, and the others' refusals wait for nobody."""
    monkeypatch.setattr("router.http.door.STALL_S", 0.5)
    door.house.cluster.top_logprobs = 100
    loop = asyncio.get_running_loop()
    with ExitStack() as stack:
        for _ in range(1000):
            raw = stack.enter_context(door.dial(4096))
            with contextlib.suppress(ConnectionError):  # turned away
                await loop.sock_sendall(raw, stream_request(400))
        await door.house.cluster.saw("first", 8)
        await eventually_status(door.house, lambda status: status.cancelled_requests >= 8)
        await door.house.check_empty()
        status = await door.house.status()
        assert status.cancelled_requests == len(door.house.cluster.happened("first"))
        assert status.finished_requests == 0
    await eventually_served(door)


async def eventually_served(door: HttpHouse) -> None:
    """The connections of those who left are still being taken down."""
    async with asyncio.timeout(10):
        while (await door.complete()).status_code != 200:
            await asyncio.sleep(0.05)


async def test_a_client_that_leaves_before_the_first_token(door: HttpHouse) -> None:
    worker = door.house.cluster.workers["c1"]
    worker.hold("first")
    raw = door.dial()
    await asyncio.get_running_loop().sock_sendall(raw, stream_request(4))
    await door.house.cluster.saw("first")
    raw.close()
    await door.house.check_empty()
    assert (await door.house.status()).cancelled_requests == 1
    worker.let("first")


async def test_a_full_house_says_when_to_come_back(door: HttpHouse) -> None:
    worker = door.house.cluster.workers["c1"]
    worker.hold("first")
    waiting = [asyncio.create_task(door.complete()) for _ in range(8)]
    await door.house.cluster.saw("first", 8)
    refused = await door.complete()
    assert refused.status_code == 429
    assert error_of(refused) | {"message": ""} == {
        "message": "",
        "type": "rate_limit_error",
        "param": None,
        "code": "overloaded",
    }
    assert (refused.headers["retry-after"], refused.headers["retry-after-ms"]) == ("1", "1000")
    # A batch counts by prompts; those that were let in leave again.
    worker.let("first")
    assert {(await task).status_code for task in waiting} == {200}
    assert (await door.complete(prompt=[[1, 2]] * 9)).status_code == 429
    await door.house.check_empty()


async def lose(door: HttpHouse, worker: ScriptedWorker) -> None:
    """What it held then is nobody's any more."""
    del door.house.cluster.workers[worker.id]
    await worker.kill()


async def test_a_failure_names_no_worker(door: HttpHouse) -> None:
    worker = door.house.cluster.workers["c1"]
    worker.hold("first")
    asked = asyncio.create_task(door.complete())
    await door.house.cluster.saw("first")
    await lose(door, worker)
    response = await asked
    assert response.status_code == 503
    assert error_of(response)["code"] == errors.WorkerLost.code
    assert "c1" not in response.text
    response = await door.complete()
    assert (response.status_code, error_of(response)["code"]) == (503, "unavailable")
    ready = await door.client.get("/ready")
    assert ready.status_code == 503
    assert (await door.client.get("/health")).status_code == 200


async def test_a_stream_that_breaks_off_says_so(door: HttpHouse) -> None:
    worker = door.house.cluster.workers["c1"]
    worker.hold("decode")
    fields = {"prompt": [1, 2, 3], "max_tokens": 4, "stream": True}
    async with door.client.stream("POST", "/v1/completions", json=fields) as response:
        lines = response.aiter_lines()
        assert '"text"' in await anext(lines)
        await lose(door, worker)
        rest = [line async for line in lines if line]
    assert response.status_code == 200
    assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == errors.WorkerLost.code
    assert "[DONE]" not in "".join(rest)


@pytest.mark.parametrize("named", [False, True])
async def test_a_model_without_a_chat_template(tmp_path: Path, named: bool) -> None:
    """One that has several uses the one named default, and chat_template.jinja before all others."""
    path = tmp_path / "tiny"
    path.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_MODEL / name, path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    template = config.pop("chat_template")
    if named:
        config["chat_template"] = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": template}]
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    async with open_http_house(http_configuration(model={"path": str(path)})) as door:
        await door.house.join("c1")
        response = await door.client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]})
        if named:
            assert response.status_code == 200
            return
        assert response.status_code == 400
        assert error_of(response)["message"] == "model tiny has no chat template: use /v1/completions"
