"""TCP connections: small events leave at once, and more connections than there are descriptors for keep nobody out."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path

import grpc
import httpx
import pytest
from http_house import http_configuration, noted_connections, open_http_house
from router_house import ROOT, House, collect, finish_of
from scripted_worker import eventually

from tandem import rpc

DESCRIPTORS = 256
# Of them for each port.
CONNECTIONS = DESCRIPTORS * 3 // 8


async def test_a_kept_alive_connection_sends_small_events_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With Nagle's algorithm the second small write would wait for the client's ACK, which it delays by 40 ms."""
    protocols = noted_connections(monkeypatch)
    async with open_http_house(http_configuration()) as door:
        await door.house.join("c1")
        for _ in range(2):
            assert (await door.complete(stream=True)).status_code == 200
        [server] = protocols  # one connection carried both
        accepted = server.transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0


@asynccontextmanager
async def router(soft: int, hard: int) -> AsyncIterator[tuple[asyncio.subprocess.Process, int, House, list[str]]]:
    """A router process that may have so many descriptors, its HTTP port, a house around it, and its log."""
    child = await asyncio.create_subprocess_exec(
        *(
            "sh",
            "-c",
            f'ulimit -Sn {soft}; ulimit -Hn {hard}; exec "$0" -m router --port 0 --http-port 0',
            sys.executable,
        ),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )
    log: list[str] = []
    assert child.stdout is not None
    reading = asyncio.create_task(_keep(child, log))
    try:
        _, address = (await asyncio.wait_for(child.stdout.readline(), 20)).decode().split()
        async with rpc.make_channel(address) as channel, AsyncExitStack() as stack:
            house = House(address, channel, stack)
            await house.start("c1")
            await eventually(lambda: house.cluster.workers["c1"].subscribed)
            yield child, (await house.status()).http_port, house, log
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()
        await reading


async def _keep(child: asyncio.subprocess.Process, log: list[str]) -> None:
    assert child.stderr is not None
    while line := await child.stderr.readline():
        log.append(line.decode())


@asynccontextmanager
async def flood(port: int, count: int) -> AsyncIterator[list[socket.socket]]:
    """So many connections that send nothing, or that the other side has closed."""
    with ExitStack() as stack:
        raws = [stack.enter_context(socket.socket()) for _ in range(count)]
        for raw in raws:
            raw.setblocking(False)
            await asyncio.wait_for(asyncio.get_running_loop().sock_connect(raw, ("127.0.0.1", port)), 5)
            await asyncio.sleep(0.001)  # a SYN that finds the backlog full comes again a second later
        yield raws


def descriptors_of(child: asyncio.subprocess.Process) -> int:
    return len(os.listdir(f"/proc/{child.pid}/fd"))


def warnings_in(log: list[str]) -> list[str]:
    return [line for line in log if "WARNING" in line or "ERROR" in line or "Traceback" in line]


async def answered(house: House) -> int:
    return finish_of(await collect(house.call())).output_tokens


async def test_a_router_raises_its_descriptors_to_what_the_system_allows() -> None:
    async with router(40, DESCRIPTORS) as (child, _, house, _):
        limits = Path(f"/proc/{child.pid}/limits").read_text().splitlines()
        [line] = [line for line in limits if line.startswith("Max open files")]
        assert line.split()[3:5] == [str(DESCRIPTORS)] * 2
        assert await answered(house) == 4


async def test_idle_http_connections_keep_nobody_out() -> None:
    """Twice as many as the process has descriptors. The longest idle ones make room for who comes after them."""
    async with router(DESCRIPTORS, DESCRIPTORS) as (child, port, house, log):
        worker = house.cluster.workers["c1"]
        worker.hold("rest")
        call = house.call(max_tokens=6)
        await house.cluster.saw("decode")
        async with flood(port, 2 * DESCRIPTORS) as raws:
            await eventually(lambda: warnings_in(log))
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
                assert (await client.get("/health")).status_code == 200
                worker.let("rest")
                assert finish_of(await collect(call)).output_tokens == 6, "a stream goes on meanwhile"
                body = {"prompt": [1, 2, 3], "max_tokens": 4, "stream": True}
                assert (await client.post("/v1/completions", json=body)).text.endswith("data: [DONE]\n\n")
            assert await answered(house) == 4
            assert len([raw for raw in raws if is_open(raw)]) > CONNECTIONS // 2, "the flood still stands"
            assert descriptors_of(child) < DESCRIPTORS
        [warning] = warnings_in(log)
        assert f"{CONNECTIONS} HTTP connections are open" in warning


async def test_idle_grpc_connections_keep_no_client_out_that_is_there() -> None:
    async with router(DESCRIPTORS, DESCRIPTORS) as (child, port, house, log):
        grpc_port = int(house.cluster.router.rpartition(":")[2])
        async with flood(grpc_port, 2 * DESCRIPTORS):
            await eventually(lambda: warnings_in(log))
            assert await answered(house) == 4
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
                assert (await client.get("/health")).status_code == 200
            assert descriptors_of(child) < DESCRIPTORS
        [warning] = warnings_in(log)
        assert f"gRPC port has {CONNECTIONS} connections" in warning
        async with grpc.aio.insecure_channel(house.cluster.router) as channel:
            await asyncio.wait_for(channel.channel_ready(), 10)


def is_open(raw: socket.socket) -> bool:
    try:
        return raw.recv(1) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False
