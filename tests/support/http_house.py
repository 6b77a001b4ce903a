"""The real router's HTTP door with scripted workers behind it, in this process."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from router_house import House, open_house

from router.doors.http.door import BoundedHTTP
from tandem.config import TandemConfig, parse_config

HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


@dataclass
class HttpHouse:
    house: House
    port: int
    client: httpx.AsyncClient

    async def complete(self, **fields: Any) -> httpx.Response:
        return await self.client.post("/v1/completions", json={"prompt": [1, 2, 3], "max_tokens": 4, **fields})

    async def post(self, body: bytes, path: str = "/v1/completions", **headers: str) -> httpx.Response:
        return await self.client.post(path, content=body, headers={"content-type": "application/json", **headers})

    def dial(self, receive_buffer: int = 0) -> socket.socket:
        """A client of its own making; a small buffer makes it a slow reader sooner."""
        raw = socket.socket()
        if receive_buffer:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        raw.connect(("127.0.0.1", self.port))
        raw.setblocking(False)
        return raw


def http_configuration(model: dict[str, Any] | None = None, **router: Any) -> TandemConfig:
    return parse_config(
        {"model": model or {}, "router": {"port": 0, "http_port": 0, "heartbeat_timeout_s": 5.0, **router}}
    )


@asynccontextmanager
async def open_http_house(config: TandemConfig) -> AsyncIterator[HttpHouse]:
    async with open_house(config) as house:
        port = (await house.status()).http_port
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
            yield HttpHouse(house, port, client)


def error_of(response: httpx.Response) -> dict[str, Any]:
    """Every error has OpenAI's shape."""
    body: dict[str, Any] = response.json()
    assert list(body) == ["error"]
    assert sorted(body["error"]) == ["code", "message", "param", "type"]
    found: dict[str, Any] = body["error"]
    return found


async def read_all(raw: socket.socket, within_s: float = 10) -> bytes:
    """Until the other side closes."""
    received = b""
    async with asyncio.timeout(within_s):
        with raw:
            while data := await asyncio.get_running_loop().sock_recv(raw, 1 << 16):
                received += data
    return received


def refused(answer: bytes, status: int) -> dict[str, Any]:
    """The error object, as long as its headers say, of an answer that no handler gave."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), head
    headers = [line.lower() for line in head.split(b"\r\n")]
    assert {b"content-type: application/json", b"connection: close", b"content-length: %d" % len(body)} <= set(headers)
    error: dict[str, Any] = json.loads(body)["error"]
    assert error["message"]
    return error


def noted_connections(monkeypatch: pytest.MonkeyPatch) -> list[BoundedHTTP]:
    """The server's end of each, from now on."""
    protocols: list[BoundedHTTP] = []
    made = BoundedHTTP.connection_made
    monkeypatch.setattr(
        BoundedHTTP, "connection_made", lambda self, transport: (protocols.append(self), made(self, transport))[1]
    )
    return protocols
