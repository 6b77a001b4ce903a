"""The id of a request: the same in the answer, its header, the router's log and what workers get; a client's own beside
it. And a request is one line in the log, whatever way it ends.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from http_house import HttpHouse, http_configuration, open_http_house
from router_house import collect
from scripted_worker import eventually

from tandem import rpc
from tandem.errors import InternalError, Unavailable
from tandem.types import Accepted
from tandem.v1 import generation_pb2

HEADER = "x-request-id"


@pytest.fixture
async def door() -> AsyncIterator[HttpHouse]:
    async with open_http_house(http_configuration(max_live_requests=4)) as opened:
        await opened.house.pair()
        yield opened


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """What the requests' lines say, as they come."""
    found: list[dict[str, Any]] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(
                {"request_id": record.__dict__["request_id"], "level": record.levelno, **record.__dict__["fields"]}
            )

    caplog.set_level(logging.INFO, "router.life.request_log")
    handler = Lines()
    logging.getLogger("router.life.request_log").addHandler(handler)
    yield found
    logging.getLogger("router.life.request_log").removeHandler(handler)


@pytest.mark.parametrize("given", [None, "3f2a:my=id/7", "x" * 128])
@pytest.mark.parametrize("stream", [False, True])
async def test_one_id_everywhere(door: HttpHouse, lines: list[dict[str, Any]], given: str | None, stream: bool) -> None:
    headers = {HEADER: given} if given else {}
    body = {"prompt": [1, 2, 3], "max_tokens": 4, "stream": stream, "n": 2, "user": "bob"}
    answer = await door.client.post("/v1/completions", json=body, headers=headers)
    text = answer.text.split("\n\n")[0].removeprefix("data: ") if stream else answer.text
    ours = json.loads(text)["id"]
    assert answer.headers[HEADER] == (given or ours)
    await eventually(lambda: lines)
    (line,) = lines
    assert line["request_id"] == ours
    assert line.get("client_request_id") == given
    assert (line["level"], line["status"], line["model"], line["tag"]) == (logging.INFO, 200, "tiny", "bob")
    assert (line["prompt_tokens"], line["output_tokens"], line["finish_reason"]) == (3, 8, "length")
    assert (line["prefill_worker"], line["decode_worker"]) == ("p1", "d1")
    assert 0 < line["ttft_ms"] <= line["total_ms"]
    seen = {request.request.request_id for request in door.house.cluster.workers["d1"].reserve_requests}
    assert seen == {f"{ours}-0", f"{ours}-1"}
    assert seen == {request.request.request_id for request in door.house.cluster.workers["p1"].prefill_requests}


async def test_several_prompts_are_one_request(door: HttpHouse, lines: list[dict[str, Any]]) -> None:
    answer = await door.complete(prompt=[[1, 2], [3]])
    await eventually(lambda: lines)
    (line,) = lines
    assert line["request_id"] == answer.json()["id"]
    assert (line["prompt_tokens"], line["output_tokens"]) == (3, 8)
    seen = {request.request.request_id for request in door.house.cluster.workers["d1"].reserve_requests}
    assert seen == {f"{line['request_id']}-0", f"{line['request_id']}-1"}


async def test_clients_may_give_the_same_id(door: HttpHouse, lines: list[dict[str, Any]]) -> None:
    """Also while the other's request is live."""
    door.house.cluster.workers["d1"].hold("rest")
    asked = [asyncio.create_task(door.post(b'{"prompt": [1], "max_tokens": 4}', **{HEADER: "same"})) for _ in range(2)]
    await door.house.cluster.saw("decode", 2)
    door.house.cluster.workers["d1"].let("rest")
    answers = await asyncio.gather(*asked)
    assert [(answer.status_code, answer.headers[HEADER]) for answer in answers] == [(200, "same")] * 2
    await eventually(lambda: len(lines) == 2)
    assert len({line["request_id"] for line in lines}) == 2
    assert {line["client_request_id"] for line in lines} == {"same"}


@pytest.mark.parametrize(
    "given",
    [
        [(HEADER, "two words")],
        [(HEADER, "x" * 129)],
        [(HEADER, "tab\there")],
        [(HEADER, "gr\u00fcn".encode("latin-1"))],
        [(HEADER, "one"), (HEADER, "two")],
    ],
)
async def test_an_id_that_could_confuse_a_reader_is_refused(
    door: HttpHouse, lines: list[dict[str, Any]], given: list[tuple[str, str | bytes]]
) -> None:
    headers = [(name.encode(), value if isinstance(value, bytes) else value.encode()) for name, value in given]
    answer = await door.client.post("/v1/completions", json={"prompt": [1]}, headers=headers)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, HEADER)
    assert "1 to 128 visible ASCII characters" in error["message"]
    assert lines[0]["request_id"] == answer.headers[HEADER]
    assert lines[0]["error"] == "invalid_request"
    assert not door.house.cluster.workers["d1"].reserve_requests


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "error"),
    [
        ("POST", "/v1/completions", '{"prompt": 5}', 400, "invalid_request"),
        ("POST", "/v1/completions", "[", 400, "invalid_request"),
        ("POST", "/v1/chat/completions", '{"messages": 5}', 400, "invalid_request"),
        ("POST", "/v1/completions", '{"prompt": [1], "model": "other"}', 404, "model_not_found"),
        ("POST", "/v1/nowhere", "{}", 404, None),
        ("PUT", "/v1/completions", "{}", 405, None),
    ],
)
async def test_a_refusal_has_an_id_too(
    door: HttpHouse, lines: list[dict[str, Any]], method: str, path: str, body: str, status: int, error: str | None
) -> None:
    for given in (None, "theirs"):
        headers = {"content-type": "application/json"} | ({HEADER: given} if given else {})
        answer = await door.client.request(method, path, content=body, headers=headers)
        line = lines.pop()
        assert lines == []
        assert (answer.status_code, line["status"], line.get("error")) == (status, status, error)
        assert answer.headers[HEADER] == (given or line["request_id"])


async def test_so_has_one_that_was_too_many_and_one_that_met_a_bug(
    door: HttpHouse, lines: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = door.house.cluster.workers["d1"]
    decode.hold("reserve")
    filling = asyncio.create_task(door.complete(n=4))
    await door.house.cluster.saw("reserve", 4)
    full = await door.complete()
    decode.let("reserve")
    await filling
    decode.errors["decode"] = InternalError("secret")
    broken = await door.complete()
    del decode.errors["decode"]
    monkeypatch.setattr("router.doors.http.answers.OpenAIAnswer.object", lambda _: 1 / 0)
    bug = await door.client.post("/v1/completions", json={"prompt": [1], "max_tokens": 1})
    assert [each.status_code for each in (full, broken, bug)] == [429, 500, 500]
    told = {line["request_id"]: line.get("error") for line in lines}
    assert [told[each.headers[HEADER]] for each in (full, broken, bug)] == ["overloaded", "internal", "internal"]
    failed = next(line for line in lines if line["request_id"] == broken.headers[HEADER])
    assert (failed["decode_worker"], failed["error_message"]) == ("d1", "secret")
    assert failed["output_tokens"] in (0, 1), "the first token and the failure come by two connections"


async def test_what_is_no_http_gets_an_id(door: HttpHouse) -> None:
    raw = door.dial()
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(raw, b"nonsense\r\n\r\n")
    head = (await asyncio.wait_for(loop.sock_recv(raw, 4096), 5)).lower()
    assert head.startswith(b"http/1.1 400 ")
    assert f"\r\n{HEADER}: http-".encode() in head
    raw.close()


async def test_a_client_that_leaves_and_a_stream_that_breaks_off_are_told_of(
    door: HttpHouse, lines: list[dict[str, Any]]
) -> None:
    decode = door.house.cluster.workers["d1"]
    decode.hold("rest")
    async with door.client.stream("POST", "/v1/completions", json={"prompt": [1], "stream": True}) as answer:
        await anext(answer.aiter_lines())
    await eventually(lambda: lines)
    assert (lines[0]["error"], lines[0]["decode_worker"], lines[0]["status"]) == ("cancelled", "d1", 200)
    decode.let("rest")
    decode.errors["decode"] = Unavailable("gone")
    async with door.client.stream("POST", "/v1/completions", json={"prompt": [1], "stream": True}) as answer:
        await answer.aread()
    await eventually(lambda: len(lines) == 2)
    assert (lines[1]["error"], lines[1]["request_id"]) == ("unavailable", answer.headers[HEADER])


async def test_probes_are_no_news(door: HttpHouse, lines: list[dict[str, Any]]) -> None:
    for path in ("/health", "/ready", "/metrics", "/v1/models"):
        answer = await door.client.get(path, headers={HEADER: "probe"})
        assert (answer.status_code, answer.headers[HEADER]) == (200, "probe")
    assert [line for line in lines if line["level"] >= logging.INFO] == []


async def test_at_the_other_door_it_is_metadata(door: HttpHouse, lines: list[dict[str, Any]]) -> None:
    request = generation_pb2.GenerateRequest(token_ids=generation_pb2.TokenIds(ids=[1]))
    call = door.house.stub.Generate(request, metadata=((HEADER, "theirs"),))
    accepted, *_ = await collect(call)
    assert isinstance(accepted, Accepted)
    assert [dict(await each())[HEADER] for each in (call.initial_metadata, call.trailing_metadata)] == ["theirs"] * 2
    await eventually(lambda: lines)
    assert (lines[0]["request_id"], lines[0]["client_request_id"]) == (accepted.request_id, "theirs")
    for metadata, field in (((), "model"), (((HEADER, "two words"),), HEADER)):
        request.model = "other"
        call = door.house.stub.Generate(request, metadata=metadata)
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            async for _ in call:
                pass
        assert rpc.error_from_rpc(failed.value).field == field
        await eventually(lambda: len(lines) == 2)
        assert dict(await call.trailing_metadata())[HEADER] == lines.pop()["request_id"]
