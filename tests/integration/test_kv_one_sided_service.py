"""Transports whose sender writes into the receiver's pool itself, between real workers: exact, told by `status`, and
fenced when a prefill worker stops or dies."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from engine_driver import EngineDriver
from service import Service, running_service, wait_until

from tandem.client.completion import Completion
from tandem.config import TINY_MODEL
from tandem.errors import TandemError
from tandem.types import Role, SamplingParams

GREEDY = SamplingParams(max_tokens=24, ignore_eos=True)
LENGTHS = (1, 7, 33, 200)
LONG_PROMPT = 1800
NIXL: dict[str, Any] = {"nixl_devices": "lo"}


@pytest.fixture(scope="module", params=["shm", "nixl"])
def transport(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name == "nixl":
        request.getfixturevalue("nixl")
    return name


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, transport: str) -> Iterator[Service]:
    """By shared memory without being told to."""
    with running_service(
        tmp_path_factory.mktemp(transport),
        prefill=2,
        # Small steps: a long prompt takes long enough to be caught in mid-transfer.
        engine={"max_step_tokens": 8},
        worker=NIXL if transport == "nixl" else {},
        router={
            "heartbeat_interval_s": 0.1,
            "heartbeat_timeout_s": 1.5,
            "transport": "auto" if transport == "shm" else transport,
        },
    ) as service:
        yield service


@pytest.fixture(scope="module")
def colocated() -> EngineDriver:
    return EngineDriver(TINY_MODEL, prefix_cache=False, threads=1)


def prompts(seed: int) -> list[list[int]]:
    chance = random.Random(seed)
    return [chance.choices(range(3, 1500), k=length) for length in LENGTHS]


def served(service: Service, asked: list[list[int]], by: str) -> list[list[int]]:
    choices = [service.client.complete(prompt, sampling=GREEDY).choices[0] for prompt in asked]
    assert {choice.report.transport for choice in choices} == {by}
    return [[token.id for token in choice.tokens] for choice in choices]


def quarantined(service: Service) -> int:
    return service.integrity_of(Role.DECODE).quarantined_blocks


def test_tokens_are_exact_and_status_tells_of_it(service: Service, transport: str, colocated: EngineDriver) -> None:
    assert all({"shm", "grpc", transport} == {*worker.transports} for worker in service.status().workers)
    asked = prompts(1)
    assert served(service, asked, transport) == colocated.generate(asked, GREEDY)
    wait_until(
        lambda: service.worker_of(Role.DECODE).load.kv_received[transport].bytes > 0,
        what="a heartbeat that tells of it",
    )


def in_mid_transfer(
    service: Service, transport: str, threads: ThreadPoolExecutor, seed: int
) -> tuple[Future[Completion], str]:
    """A request whose KV is on its way, and the name of the process that sends it."""
    before = service.worker_of(Role.DECODE).load.kv_received[transport].frames
    prompt = random.Random(seed).choices(range(3, 1500), k=LONG_PROMPT)
    asked = threads.submit(service.client.complete, prompt, max_tokens=20)

    def sender() -> str:
        if service.worker_of(Role.DECODE).load.kv_received[transport].frames < before + 3:
            return ""
        (live,) = service.status().requests
        (pid,) = [worker.pid for worker in service.status().workers if worker.worker_id == live.prefill_worker]
        return next(name for name, process in service.processes.items() if process.pid == pid)

    name: str = wait_until(sender, what="KV on its way")
    return asked, name


def test_blocks_of_a_stopped_prefill_worker_wait(service: Service, transport: str, colocated: EngineDriver) -> None:
    """Until it wakes where it holds their lock, else until it is shut out."""
    asked = prompts(3)
    wanted = colocated.generate(asked, GREEDY)
    with ThreadPoolExecutor(1) as threads:
        request, name = in_mid_transfer(service, transport, threads, seed=4)
        try:
            service.processes[name].send(signal.SIGSTOP)
            assert isinstance(request.exception(10), TandemError)
            assert quarantined(service) >= LONG_PROMPT // 16, "the fault took effect"
            assert served(service, asked, transport) == wanted
            if transport == "shm":
                assert quarantined(service) >= LONG_PROMPT // 16
            else:
                wait_until(lambda: quarantined(service) == 0, what="the writer that sleeps is shut out")
                assert served(service, asked, transport) == wanted
        finally:
            service.processes[name].send(signal.SIGCONT)
    wait_until(lambda: quarantined(service) == 0, what="the last write of the worker that woke")
    service.wait_joined(3)
    wait_until(service.idle, 3, "no orphan")
    again = prompts(5)
    assert served(service, again, transport) == colocated.generate(again, GREEDY)


def test_a_killed_prefill_worker_holds_no_block(service: Service, transport: str, colocated: EngineDriver) -> None:
    with ThreadPoolExecutor(1) as threads:
        request, name = in_mid_transfer(service, transport, threads, seed=6)
        service.kill(name)
        assert isinstance(request.exception(10), TandemError)
    wait_until(service.idle, 2 if transport == "shm" else 5, "no orphan")
    asked = prompts(7)
    assert served(service, asked, transport) == colocated.generate(asked, GREEDY)


def test_another_transport_is_taken_where_it_is_ordered(tmp_path: Path, colocated: EngineDriver) -> None:
    asked = prompts(2)
    with running_service(tmp_path, router={"transport": "grpc"}) as service:
        assert served(service, asked, "grpc") == colocated.generate(asked, GREEDY)


@pytest.mark.usefixtures("nixl")
def test_auto_takes_shared_memory_on_one_host(tmp_path: Path, colocated: EngineDriver) -> None:
    asked = prompts(2)
    with running_service(tmp_path, worker=NIXL) as service:
        assert served(service, asked, "shm") == colocated.generate(asked, GREEDY)
