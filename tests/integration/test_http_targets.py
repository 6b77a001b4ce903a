"""Forms of a request's first line (RFC 9112, 3.2), as they come to the HTTP door."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from http_house import HttpHouse, http_configuration, open_http_house, read_all, refused


@pytest.fixture
async def door() -> AsyncIterator[HttpHouse]:
    async with open_http_house(http_configuration(http_names=["proxy.example"])) as door:
        yield door


async def answer(door: HttpHouse, line: bytes, host: bytes = b"localhost") -> bytes:
    raw = door.dial()
    await asyncio.get_running_loop().sock_sendall(raw, line + b"\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n")
    return await read_all(raw)


@pytest.mark.parametrize(
    "target",
    [
        b"/health",
        b"http://localhost/health",
        b"HTTP://LocalHost:1234/health?a=b",
        b"https://127.0.0.1/health",
        b"http://[::1]:8701/health#part",
        b"http://proxy.example/health",
    ],
)
async def test_a_target_may_be_a_whole_url(door: HttpHouse, target: bytes) -> None:
    assert (await answer(door, b"GET " + target + b" HTTP/1.1")).startswith(b"HTTP/1.1 200 ")
    # What the header says does not count beside the URL's own host.
    other = await answer(door, b"GET " + target + b" HTTP/1.1", host=b"evil.example")
    assert other.startswith(b"HTTP/1.1 421 " if target.startswith(b"/") else b"HTTP/1.1 200 ")


async def test_the_host_of_a_whole_url_is_looked_at(door: HttpHouse) -> None:
    assert (await answer(door, b"GET http://evil.example/health HTTP/1.1")).startswith(b"HTTP/1.1 421 ")


@pytest.mark.parametrize(
    "target", [b"http://localhost", b"http://localhost?x", b"http:///health", b"ftp://localhost/health"]
)
async def test_a_url_that_leads_nowhere(door: HttpHouse, target: bytes) -> None:
    assert (await answer(door, b"GET " + target + b" HTTP/1.1")).startswith(b"HTTP/1.1 404 ")


@pytest.mark.parametrize("version", [b"0.9", b"2.0", b"3.0"])
async def test_another_version_of_http(door: HttpHouse, version: bytes) -> None:
    assert "HTTP/1.1 only" in refused(await answer(door, b"PRI * HTTP/" + version), 505)["message"]


@pytest.mark.parametrize("version", [b"1.0", b"1.1", b"1.9"])
async def test_every_minor_version_of_http_1(door: HttpHouse, version: bytes) -> None:
    assert (await answer(door, b"GET /health HTTP/" + version)).startswith(b"HTTP/1.1 200 ")
