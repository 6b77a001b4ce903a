"""How the real router ends: in this process, and as one of its own."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from router_house import ROOT, House, collect, configuration, finish_of, open_house, open_house_around
from scripted_worker import eventually

from tandem import errors, rpc
from tandem.types import FinishReason


@pytest.fixture
async def house() -> AsyncIterator[House]:
    async with open_house(configuration()) as opened:
        yield opened


async def test_a_stopping_router_lets_live_requests_finish_and_refuses_new_ones() -> None:
    async with AsyncExitStack() as outer:
        router = AsyncExitStack()
        house = await router.enter_async_context(open_house_around(outer, configuration()))
        prefill, _ = await house.pair()
        prefill.hold("first")
        call = house.call()
        await house.cluster.saw("first")
        stopping = asyncio.create_task(router.aclose())
        await asyncio.wait_for(refused(house), 5)
        prefill.let("first")
        assert finish_of(await collect(call)).reason is FinishReason.LENGTH
        await asyncio.wait_for(stopping, 5)


async def refused(house: House) -> None:
    """Sends requests until one is refused; those that were taken wait at the held worker and are cancelled."""
    while True:
        call = house.call()
        try:
            await asyncio.wait_for(collect(call), 0.2)
        except TimeoutError:
            call.cancel()
        except errors.Unavailable as error:
            assert "the router is stopping" in str(error)  # noqa: PT017
            return


async def test_a_stopping_router_fails_what_does_not_end() -> None:
    async with AsyncExitStack() as outer:
        router = AsyncExitStack()
        house = await router.enter_async_context(open_house_around(outer, configuration(drain_timeout_s=0.1)))
        prefill, _ = await house.pair()
        prefill.hold("first")
        call = house.call()
        await house.cluster.saw("first")
        prefill.silent = True
        await asyncio.wait_for(router.aclose(), 5)
        with pytest.raises(errors.Unavailable, match="the router stopped before the request had ended"):
            await collect(call)
        assert house.cluster.happened("abort")
        await eventually(lambda: prefill.join_error)
        assert isinstance(prefill.join_error, errors.Unavailable), "it may join the next router here"


# The process.


@asynccontextmanager
async def process(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "router", *arguments, stdout=pipe, stderr=pipe, cwd=ROOT
    )
    try:
        yield child
    finally:
        if child.returncode is None:
            child.kill()
        await child.communicate()


async def test_the_process_says_ready_serves_and_stops_on_a_signal(tmp_path: Path) -> None:
    config = tmp_path / "tandem.yaml"
    config.write_text("router: {port: 1, http_port: 0}\nlog: {level: debug}")
    async with process("--config", str(config), "--port", "0") as child:
        assert child.stdout is not None
        ready = (await asyncio.wait_for(child.stdout.readline(), 20)).decode()
        word, address = ready.split()
        assert word == "ready"
        assert address.startswith("127.0.0.1:")
        async with rpc.make_channel(address) as channel, AsyncExitStack() as stack:
            house = House(address, channel, stack)
            await house.start("c1")
            await eventually(lambda: house.cluster.workers["c1"].subscribed)
            assert finish_of(await collect(house.call())).output_tokens == 4
            health: Any = health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call]
            answer = await health.Check(health_pb2.HealthCheckRequest(service="tandem.v1.Generation"))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            child.terminate()
            output, log = await asyncio.wait_for(child.communicate(), 10)
        assert (child.returncode, output) == (0, b"")
        assert b"Traceback" not in log
        assert b"[-] worker c1 is routable" in log
        request_id = house.cluster.happened("reserve")[0]
        assert f"[{request_id}] placed on c1 and c1 by local".encode() in log
        ended = f"[{request_id}] ended finish_reason=length model=tiny prompt_tokens=3 output_tokens=4 "
        assert log.count(ended.encode()) == 1


async def test_a_second_signal_ends_the_process_at_once() -> None:
    async with process("--port", "0", "--http-port", "-1") as child:
        assert child.stdout is not None
        _, address = (await asyncio.wait_for(child.stdout.readline(), 20)).decode().split()
        async with rpc.make_channel(address) as channel, AsyncExitStack() as stack:
            house = House(address, channel, stack)
            worker = await house.start("c1")
            await eventually(lambda: worker.subscribed)
            worker.hold("first")
            call = house.call()
            await house.cluster.saw("first")
            child.terminate()
            await refused(house)
            assert child.returncode is None
            child.send_signal(signal.SIGINT)
            with pytest.raises(errors.Unavailable, match="the router stopped before the request had ended"):
                await collect(call)
            await asyncio.wait_for(child.communicate(), 10)  # and not after router.drain_timeout_s, 30 s
        assert child.returncode == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("router: {port: %d}", "cannot listen on 127.0.0.1:%d: the port is in use"),
        (
            "router: {port: 0, http_port: %d}",
            "router.http_port (--http-port): cannot listen on 127.0.0.1:%d: the port is in use",
        ),
        ("router: {prot: %d}", "unknown config key router.prot; did you mean router.port?"),
    ],
)
async def test_a_wrong_configuration_ends_the_process_with_2(
    house: House, tmp_path: Path, text: str, message: str
) -> None:
    taken = int(house.cluster.router.rpartition(":")[2])
    config = tmp_path / "tandem.yaml"
    config.write_text(text % taken)
    async with process("--config", str(config)) as child:
        output, log = await asyncio.wait_for(child.communicate(), 20)
    assert (child.returncode, output) == (2, b"")
    assert (message % taken if "%" in message else message) in log.decode()
    assert "Traceback" not in log.decode()
