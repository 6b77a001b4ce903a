"""Clients that send too much, too slowly, or nothing, and those that never read: all are bounded."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import httpx
import pytest
from http_house import (
    HEAD,
    HttpHouse,
    error_of,
    http_configuration,
    noted_connections,
    open_http_house,
    read_all,
    refused,
)
from router_house import eventually_status
from scripted_worker import eventually

from router.doors.http import body
from router.doors.http.door import SEND_BUFFER_BYTES
from tandem.process.descriptors import MOST_BACKLOG as BACKLOG

LIMIT = 64 << 10
# asyncio's own limit, above which a transport asks its writer to pause.
ASYNCIO_BUFFER_BYTES = 64 << 10
HEAD_OF_20 = HEAD + b"content-length: 20\r\n\r\n"


@pytest.fixture
async def door() -> AsyncIterator[HttpHouse]:
    async with open_http_house(http_configuration(max_message_bytes=LIMIT, max_live_requests=8)) as door:
        await door.house.join("c1")
        yield door
        await door.house.check_empty()


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
    await loop.sock_sendall(raw, HEAD + b"content-length: %d\r\n\r\n" % 10**15)
    assert (await read_all(raw)).startswith(b"HTTP/1.1 413 ")


async def test_a_body_that_does_not_arrive(door: HttpHouse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.doors.http.body.READ_S", 0.2)
    raw = door.dial()
    await asyncio.get_running_loop().sock_sendall(raw, HEAD_OF_20 + b"{")
    answer = await read_all(raw)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"did not arrive within 0.2 s" in answer


async def test_a_client_that_leaves_within_its_body_is_no_bug(
    door: HttpHouse, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, ended, read = asyncio.Event(), asyncio.Event(), body._read

    async def noted(request: Any, limit: int) -> bytes:
        began.set()
        try:
            return await read(request, limit)
        finally:
            ended.set()

    monkeypatch.setattr(body, "_read", noted)
    raw = door.dial()
    await asyncio.get_running_loop().sock_sendall(raw, HEAD_OF_20 + b"{")
    await asyncio.wait_for(began.wait(), 5)
    raw.close()
    await asyncio.wait_for(ended.wait(), 5)
    assert (await door.complete()).status_code == 200
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


@pytest.mark.parametrize("beginning", [b"", b"POST /v1/comp", b"GET /health HTTP/1.1\r\nhost: localhost\r\nx-slow: "])
async def test_headers_that_do_not_arrive(door: HttpHouse, monkeypatch: pytest.MonkeyPatch, beginning: bytes) -> None:
    monkeypatch.setattr("router.doors.http.door.HEADERS_S", 0.2)
    raw = door.dial()
    await asyncio.get_running_loop().sock_sendall(raw, beginning)
    assert await outcome(raw) == b""


async def test_headers_of_a_second_request_that_do_not_arrive(door: HttpHouse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.doors.http.door.HEADERS_S", 0.3)
    raw, loop = door.dial(), asyncio.get_running_loop()
    await loop.sock_sendall(raw, b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
    assert b'{"status":"ok"}' in await loop.sock_recv(raw, 1 << 16)
    await loop.sock_sendall(raw, b"GET /hea")
    assert await outcome(raw, 4) == b"", "sooner than an idle connection ends"


async def test_a_thousand_connections_that_never_send(door: HttpHouse, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that have waited longest make room for the next, the others time out; requests are served all the time."""
    monkeypatch.setattr("router.doors.http.door.HEADERS_S", 2.0)
    protocols = noted_connections(monkeypatch)
    assert (await door.complete()).status_code == 200  # its connection stays
    idle = []
    for _ in range(1000):
        idle.append(door.dial())
        await asyncio.sleep(0)  # the door takes it in
        assert len(protocols[0].connections) <= 8 + 512 + BACKLOG
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{door.port}") as newcomer:
        assert (await newcomer.get("/health")).status_code == 200
    async with asyncio.TaskGroup() as tasks:
        reads = [tasks.create_task(outcome(raw)) for raw in idle]
        assert (await door.complete()).status_code == 200
    assert {read.result() for read in reads} == {b""}
    assert len(protocols) >= 1002
    assert (await door.complete()).status_code == 200


async def test_one_more_than_all_connections_that_ask(door: HttpHouse, monkeypatch: pytest.MonkeyPatch) -> None:
    protocols = noted_connections(monkeypatch)
    with ExitStack() as stack:
        first = stack.enter_context(door.dial())
        await asyncio.get_running_loop().sock_sendall(first, HEAD_OF_20)
        await eventually(lambda: protocols and protocols[0].cycle is not None)
        monkeypatch.setattr(type(protocols[0]), "max_connections", 1)
        assert refused(await read_all(door.dial()), 503)["code"] == "service_unavailable"
        await asyncio.get_running_loop().sock_sendall(first, b'{"prompt":[1,2,3]  }')
        assert (await asyncio.get_running_loop().sock_recv(first, 100)).startswith(b"HTTP/1.1 200 ")


async def outcome(raw: Any, within_s: float = 20) -> bytes:
    try:
        return await read_all(raw, within_s)
    except ConnectionResetError:
        return b""


def stream_request(max_tokens: int) -> bytes:
    # Log probabilities make each event large, and so the buffers on the way full.
    fields = {"prompt": [1, 2, 3], "max_tokens": max_tokens, "stream": True, "logprobs": 20, "ignore_eos": True}
    body = json.dumps(fields).encode()
    return HEAD + b"content-length: %d\r\n\r\n" % len(body) + body


async def test_clients_that_never_read_are_cancelled(door: HttpHouse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.doors.http.door.STALL_S", 0.5)
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


async def test_the_last_bytes_of_an_answer_wait_for_nobody_either(
    door: HttpHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few enough to be taken at once by the process: who leaves them must not keep the connection."""
    monkeypatch.setattr("router.doors.http.door.STALL_S", 0.5)
    protocols = noted_connections(monkeypatch)
    with door.dial(4096) as raw:
        await eventually(lambda: protocols)
        [server] = protocols
        while not server.transport.get_write_buffer_size():
            cycle = server.cycle
            await asyncio.get_running_loop().sock_sendall(raw, b"GET /metrics HTTP/1.1\r\nhost: localhost\r\n\r\n")
            await eventually(lambda before=cycle: server.cycle is not before and server.cycle.response_complete)
        assert server.transport.get_write_buffer_size() < ASYNCIO_BUFFER_BYTES
        await eventually(lambda: server not in server.connections, 10)


async def test_what_waits_for_a_client_that_does_not_read_is_bounded(
    door: HttpHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing of it is lost: when the client reads on, it gets the whole answer."""
    protocols = noted_connections(monkeypatch)
    door.house.cluster.top_logprobs = 100
    loop, raw = asyncio.get_running_loop(), door.dial(4096)
    await loop.sock_sendall(raw, stream_request(400))
    await eventually(lambda: protocols and protocols[-1].flow.write_paused)
    await eventually(lambda: door.house.cluster.workers["c1"].held_requests == 0)  # decoding waits for nobody
    transport = protocols[-1].transport
    assert transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 2 * SEND_BUFFER_BYTES
    event = len((await door.complete(max_tokens=2, logprobs=20)).content)
    assert transport.get_write_buffer_size() < 2 * event
    assert (await door.house.status()).live_requests == 1
    received = b""
    while not received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
        received += await asyncio.wait_for(loop.sock_recv(raw, 1 << 16), 5)
    raw.close()
    assert len(received) > 2 * event + 2 * SEND_BUFFER_BYTES, "more than all buffers on the way hold"
    assert received.count(b'"finish_reason":"length"') == 1


async def test_a_thousand_connections_that_ask_and_never_read(door: HttpHouse, monkeypatch: pytest.MonkeyPatch) -> None:
    """A house for 8 takes 8 of them; they are cut off, and the others' refusals wait for nobody."""
    monkeypatch.setattr("router.doors.http.door.STALL_S", 0.5)
    door.house.cluster.top_logprobs = 100
    loop = asyncio.get_running_loop()
    with ExitStack() as stack:
        for _ in range(1000):
            raw = stack.enter_context(door.dial(4096))
            await asyncio.sleep(0)  # the door takes it in
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


@asynccontextmanager
async def asking(door: HttpHouse) -> AsyncIterator[socket.socket]:
    """A client whose prompt is being prefilled, and who is gone, with all that it caused, in the end."""
    worker, raw = door.house.cluster.workers["c1"], door.dial()
    worker.hold("first")
    await asyncio.get_running_loop().sock_sendall(raw, stream_request(4))
    await door.house.cluster.saw("first")
    yield raw
    await door.house.check_empty()
    assert (await door.house.status()).cancelled_requests == 1
    worker.let("first")


async def test_a_client_that_leaves_before_the_first_token(door: HttpHouse) -> None:
    async with asking(door) as raw:
        raw.close()


async def test_a_client_that_ends_its_sending_side_has_left(door: HttpHouse) -> None:
    """As docs/http.md has it: on the wire it is the same."""
    async with asking(door) as raw:
        raw.shutdown(socket.SHUT_WR)
        assert await outcome(raw) == b""
