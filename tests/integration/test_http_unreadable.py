"""What comes to the HTTP door and is not HTTP/1.1, or more of it than its parser takes."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from typing import Any

import pytest
from http_house import HEAD, HttpHouse, http_configuration, noted_connections, open_http_house, read_all, refused
from scripted_worker import eventually

from router.doors.http.door import HEADERS_BYTES, BoundedHTTP


@pytest.fixture
async def door() -> AsyncIterator[HttpHouse]:
    async with open_http_house(http_configuration()) as door:
        await door.house.join("c1")
        yield door
        await door.house.check_empty()


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        HEAD + b"content-length: many\r\n\r\n",
    ],
    ids=["no http", "no host", "content-length"],
)
async def test_what_the_parser_refuses(door: HttpHouse, sent: bytes) -> None:
    raw = door.dial()
    await asyncio.get_running_loop().sock_sendall(raw, sent)
    assert refused(await read_all(raw), 400)["code"] == "bad_request"


@pytest.mark.parametrize(
    "chunk", [b"zz\r\n", b"5;" + b"x" * HEADERS_BYTES, b"186a0\r\n%s\r\nzz\r\n" % (b"x" * 100_000)]
)
@pytest.mark.parametrize("at_once", [False, True])
async def test_a_body_in_bad_chunks(
    door: HttpHouse, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, chunk: bytes, at_once: bool
) -> None:
    """Its client is told, and need not leave for its connection to end."""
    monkeypatch.setattr("router.doors.http.door.HEADERS_S", 0.5)
    protocols, loop = noted_connections(monkeypatch), asyncio.get_running_loop()
    with door.dial() as raw:
        head = HEAD + b"transfer-encoding: chunked\r\n\r\n"
        await loop.sock_sendall(raw, head + chunk if at_once else head)
        await eventually(lambda: protocols and protocols[0].cycle)
        if not at_once:
            await loop.sock_sendall(raw, chunk)
        assert "the body" in refused(await read_all(raw.dup()), 400)["message"]
        assert not protocols[0].flow.read_paused, "a client that still sends it can reach the answer"
        await eventually(lambda: protocols[0] not in protocols[0].connections and not protocols[0].tasks)
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_a_bad_chunk_of_a_client_that_should_have_waited(
    door: HttpHouse, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    protocols, raw = noted_connections(monkeypatch), door.dial()
    head = HEAD + b"expect: 100-continue\r\ntransfer-encoding: chunked\r\n\r\n"
    await asyncio.get_running_loop().sock_sendall(raw, head + b"zz\r\n")
    refused(await read_all(raw), 400)
    await eventually(lambda: not protocols[0].tasks)
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_a_bad_chunk_after_the_answer(door: HttpHouse, caplog: pytest.LogCaptureFixture) -> None:
    raw, loop = door.dial(), asyncio.get_running_loop()
    await loop.sock_sendall(raw, b"GET /health HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n")
    assert b'{"status":"ok"}' in await loop.sock_recv(raw, 1 << 16)
    await loop.sock_sendall(raw, b"zz\r\n")
    assert await read_all(raw) == b""
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def with_headers_of(size: int, filler: bytes) -> bytes:
    """A request of so many bytes."""
    head, tail = b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nx:", b"x\r\n\r\n"
    return head + filler * (size - len(head + tail)) + tail


@pytest.mark.parametrize("filler", [b"x", b" "])
@pytest.mark.parametrize("size", [HEADERS_BYTES + 1, 66_000, 100_000, 200_000])
async def test_headers_that_are_too_large(door: HttpHouse, size: int, filler: bytes) -> None:
    """Whether they come at once or in parts, and also when there is little in them."""
    loop, sent = asyncio.get_running_loop(), with_headers_of(size, filler)
    raw = door.dial()
    await loop.sock_sendall(raw, sent)
    whole = await read_all(raw)
    raw = door.dial()
    await loop.sock_sendall(raw, sent[:20_000])
    assert (await door.complete()).status_code == 200, "meanwhile the part was read"
    await loop.sock_sendall(raw, sent[20_000:])
    for answer in (whole, await read_all(raw)):
        error = refused(answer, 431)
        assert error["code"] == "request_header_fields_too_large"
        assert error["message"] == "the request line and the headers have more than 65536 bytes"


async def test_headers_that_never_end(door: HttpHouse, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes after the refusal is dropped, for as long as headers may take."""
    monkeypatch.setattr("router.doors.http.door.HEADERS_S", 1.0)
    protocols = noted_connections(monkeypatch)
    with door.dial() as raw:
        async with asyncio.timeout(10):
            with contextlib.suppress(ConnectionError):
                while True:
                    await asyncio.get_running_loop().sock_sendall(raw, with_headers_of(HEADERS_BYTES, b"x")[:-4])
        await eventually(lambda: protocols[0] not in protocols[0].connections)


async def test_headers_that_are_as_large_as_they_may_be(door: HttpHouse) -> None:
    loop, sent = asyncio.get_running_loop(), with_headers_of(HEADERS_BYTES, b"x")
    for first in (HEADERS_BYTES, 40_000):
        raw = door.dial()
        await loop.sock_sendall(raw, sent[:first])
        assert (await door.complete()).status_code == 200, "meanwhile the part was read"
        await loop.sock_sendall(raw, sent[first:])
        assert (await read_all(raw)).startswith(b"HTTP/1.1 200 ")


async def test_a_client_that_resets_its_connection_when_it_is_refused(
    door: HttpHouse, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As gRPC's do; the server's end hears of it when it is told that nothing follows."""
    protocols, raw, refuse = noted_connections(monkeypatch), door.dial(), BoundedHTTP._refuse

    def refused_and_gone(self: BoundedHTTP, *answer: Any) -> None:
        refuse(self, *answer)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raw.close()

    monkeypatch.setattr(BoundedHTTP, "_refuse", refused_and_gone)
    await asyncio.get_running_loop().sock_sendall(raw, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    await eventually(lambda: protocols and protocols[0] not in protocols[0].connections)
    assert raw.fileno() == -1
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
