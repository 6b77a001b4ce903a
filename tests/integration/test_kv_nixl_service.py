"""Transport `nixl` between real workers: by order, exact, told by `status`; a prefill worker that stops is shut out."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from engine_driver import EngineDriver
from service import Service, running_service, wait_until

from tandem.client.status import WorkerState
from tandem.config import TINY_MODEL
from tandem.errors import TandemError
from tandem.types import Role, SamplingParams

pytestmark = pytest.mark.usefixtures("nixl")

GREEDY = SamplingParams(max_tokens=24, ignore_eos=True)
LENGTHS = (1, 7, 33, 200)
LONG_PROMPT = 1800
LOOPBACK = {"nixl_devices": "lo"}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    pytest.importorskip("nixl_cu12._bindings", reason="NIXL is not installed")
    with running_service(
        tmp_path_factory.mktemp("nixl"),
        prefill=2,
        # Small steps: a long prompt takes long enough to be caught in mid-transfer.
        engine={"max_step_tokens": 8},
        worker=LOOPBACK,
        router={"transport": "nixl", "heartbeat_interval_s": 0.1, "heartbeat_timeout_s": 1.5},
    ) as service:
        yield service


@pytest.fixture(scope="module")
def colocated() -> EngineDriver:
    return EngineDriver(TINY_MODEL, prefix_cache=False, threads=1)


def prompts(seed: int) -> list[list[int]]:
    chance = random.Random(seed)
    return [chance.choices(range(3, 1500), k=length) for length in LENGTHS]


def served(service: Service, asked: list[list[int]], by: str = "nixl") -> list[list[int]]:
    choices = [service.client.complete(prompt, sampling=GREEDY).choices[0] for prompt in asked]
    assert {choice.report.transport for choice in choices} == {by}
    return [[token.id for token in choice.tokens] for choice in choices]


def decode_worker(service: Service) -> WorkerState:
    workers = service.status(check_integrity=True).workers
    return next(worker for worker in workers if Role.DECODE in worker.roles)


def test_tokens_are_exact_and_status_tells_of_it(service: Service, colocated: EngineDriver) -> None:
    assert all({"shm", "grpc", "nixl"} == {*worker.transports} for worker in service.status().workers)
    asked = prompts(1)
    assert served(service, asked) == colocated.generate(asked, GREEDY)
    wait_until(lambda: decode_worker(service).load.kv_received["nixl"].bytes > 0, what="a heartbeat that tells of it")


def test_auto_takes_shared_memory_on_one_host(tmp_path: Path, colocated: EngineDriver) -> None:
    asked = prompts(2)
    with running_service(tmp_path, worker=LOOPBACK) as service:
        assert served(service, asked, by="shm") == colocated.generate(asked, GREEDY)


def test_a_stopped_prefill_worker_is_shut_out(service: Service, colocated: EngineDriver) -> None:
    asked = prompts(3)
    wanted = colocated.generate(asked, GREEDY)
    before = decode_worker(service).load.kv_received["nixl"].frames
    prompt = random.Random(4).choices(range(3, 1500), k=LONG_PROMPT)

    def sender() -> str:
        if decode_worker(service).load.kv_received["nixl"].frames < before + 3:
            return ""
        (live,) = service.status().requests
        (pid,) = [worker.pid for worker in service.status().workers if worker.worker_id == live.prefill_worker]
        return next(name for name, process in service.processes.items() if process.pid == pid)

    def quarantined() -> int:
        integrity = decode_worker(service).integrity
        assert integrity is not None
        return integrity.quarantined_blocks

    with ThreadPoolExecutor(1) as threads:
        request = threads.submit(service.client.complete, prompt, max_tokens=20)
        name: str = wait_until(sender, what="KV on its way")
        try:
            service.processes[name].send(signal.SIGSTOP)
            assert isinstance(request.exception(10), TandemError)
            assert quarantined() >= LONG_PROMPT // 16, "the fault took effect"
            assert served(service, asked) == wanted
            wait_until(lambda: quarantined() == 0, what="the writer that sleeps is shut out")
            assert served(service, asked) == wanted
        finally:
            service.processes[name].send(signal.SIGCONT)
    service.wait_joined(3)
    wait_until(service.idle, 3, "no orphan")
    again = prompts(5)
    assert served(service, again) == colocated.generate(again, GREEDY)
