"""A service in a thread of somebody else's process: its phases, its end, and when the process must end with it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

import pytest
from ray_head import free_ports
from service import START_S, wait_until

from tandem.client import Client
from tandem.config import load_config
from tandem.errors import ConfigError, Refused
from tandem.launch.ray import hosted
from tandem.launch.ray.hosted import Hosted, MemberPhase, Node, on_node, serve_spec
from tandem.launch.ray.plan import wanted_specs

NODE = Node("127.0.0.1", slots=2)


def never(code: int) -> None:
    raise AssertionError(f"the process would end with {code}")


def in_phase(it: Hosted, phase: MemberPhase, timeout_s: float = 10.0) -> None:
    wait_until(lambda: it.phase is phase, timeout_s, f"phase {phase}, now {it.phase} {it.error}")


def until_stopped(begin: threading.Event) -> Callable[[Hosted], None]:
    async def serve(it: Hosted) -> None:
        stop = asyncio.Event()
        it.stoppable(stop.set)
        it.ready("127.0.0.1:1", "worker-1")
        await stop.wait()

    def run(it: Hosted) -> None:
        assert begin.wait(10)
        asyncio.run(serve(it))

    return run


def test_a_service_starts_serves_and_leaves() -> None:
    begin = threading.Event()
    it = Hosted(until_stopped(begin), never)
    assert it.phase is MemberPhase.STARTING
    begin.set()
    in_phase(it, MemberPhase.SERVING)
    assert (it.address, it.worker_id) == ("127.0.0.1:1", "worker-1")
    it.drain()
    in_phase(it, MemberPhase.LEFT)
    it.drain()  # again, with nobody left to hear it


def test_one_that_is_drained_before_it_serves_leaves_too() -> None:
    begin = threading.Event()
    it = Hosted(until_stopped(begin), never)
    it.drain()
    begin.set()
    in_phase(it, MemberPhase.LEFT)


def test_a_refusal_is_told_and_the_process_stays() -> None:
    def refused(_: Hosted) -> None:
        raise Refused("block_size 32 against 16")

    it = Hosted(refused, never)
    in_phase(it, MemberPhase.FAILED)
    assert (it.error, it.code) == ("block_size 32 against 16", Refused.code)


def test_a_node_without_a_package_says_which() -> None:
    def broken(_: Hosted) -> None:
        raise ImportError("No module named 'torch'", name="torch")

    it = Hosted(broken, never)
    in_phase(it, MemberPhase.FAILED)
    assert "No module named 'torch'" in it.error


def test_a_crash_ends_the_process_after_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosted, "CRASH_PAUSE_S", 0.2)
    ended: list[int] = []
    begin = threading.Event()

    def crash(_: Hosted) -> None:
        assert begin.wait(10)
        raise ZeroDivisionError

    Hosted(crash, ended.append)
    since_s = time.monotonic()
    begin.set()
    wait_until(lambda: ended == [1])
    assert time.monotonic() - since_s >= 0.2


def test_a_spec_that_is_wrong_fails_with_its_key() -> None:
    spec = wanted_specs(load_config(), "127.0.0.1")["router"].replace('"lease_s": 10.0', '"lease_s": -1')
    it = Hosted(lambda it: serve_spec(spec, NODE, it), never)
    in_phase(it, MemberPhase.FAILED)
    assert "router.lease_s" in it.error
    assert it.code == ConfigError.code


def test_a_router_serves_in_a_thread_and_leaves() -> None:
    (port,) = free_ports(1)
    spec = wanted_specs(load_config(overrides={"router": {"port": port, "http_port": -1}}), "127.0.0.1")["router"]
    it = Hosted(lambda it: serve_spec(spec, NODE, it), never)
    in_phase(it, MemberPhase.SERVING, START_S)
    with Client(it.address) as client:
        assert client.status().workers == ()
    it.drain()
    in_phase(it, MemberPhase.LEFT)


def test_a_node_gives_its_address_and_a_share_of_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosted, "usable_cores", lambda: list(range(8)))
    filled = on_node(load_config(), Node("10.0.0.2", slots=3))
    assert (filled.worker.host, filled.engine.threads) == ("10.0.0.2", 2)
    assert on_node(load_config(), Node("10.0.0.2", slots=20)).engine.threads == 1


def test_what_was_configured_stays() -> None:
    chosen = load_config(overrides={"worker": {"host": "127.0.0.1"}, "engine": {"threads": 5}})
    filled = on_node(chosen, Node("10.0.0.2", slots=1))
    assert (filled.worker.host, filled.engine.threads) == ("127.0.0.1", 5)
