"""Workers that die, freeze or are told to leave: one clear error within seconds or none, and nothing orphaned."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from service import Process, Service, running_service, wait_until

from tandem.client.completion import Completion
from tandem.client.status import LiveRequest, WorkerState
from tandem.errors import WorkerLost
from tandem.types import Role

# Workers of each role, until the last tests drain some.
POOL = 2
HEARTBEAT_TIMEOUT_S = 1.5
LONG_PROMPT, LONG_OUTPUT = 1800, 700
SMALL = {"prompt_tokens": 20, "max_tokens": 400}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running_service(
        tmp_path_factory.mktemp("loss"),
        prefill=POOL,
        decode=POOL,
        # Small steps: a long prompt takes long enough to be caught in mid-prefill.
        engine={"max_step_tokens": 4},
        router={"heartbeat_interval_s": 0.1, "heartbeat_timeout_s": HEARTBEAT_TIMEOUT_S},
    ) as service:
        yield service


@pytest.fixture(autouse=True)
def _healthy(service: Service) -> Iterator[None]:
    yield
    wait_until(service.idle, 3, "no orphan")
    assert service.client.complete("The color of dog").text == " can vary widely"


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as threads:
        yield threads


class Asked:
    """A request under way in a thread, on workers of its own."""

    def __init__(self, service: Service, threads: ThreadPoolExecutor, prompt_tokens: int, max_tokens: int) -> None:
        self.service = service
        self.max_tokens = max_tokens
        before = {live.request_id for live in service.status().requests}
        ids = [random.SystemRandom().randrange(3, 1500) for _ in range(prompt_tokens)]
        self.future: Future[Completion] = threads.submit(
            service.client.complete, ids, max_tokens=max_tokens, ignore_eos=True
        )
        self.id = wait_until(
            lambda: {live.request_id for live in service.status().requests if live.prefill_worker} - before
        ).pop()

    @property
    def live(self) -> LiveRequest | None:
        return next((live for live in self.service.status().requests if live.request_id == self.id), None)

    def wait_phase(self, *phases: str) -> LiveRequest:
        def reached() -> LiveRequest | None:
            live = self.live
            assert live is not None, f"it ended before it was in {phases}"
            return live if live.phase in phases else None

        found: LiveRequest = wait_until(reached, what=f"phase in {phases}")
        return found

    def tokens(self) -> int:
        """Waits for the whole answer."""
        return len(self.future.result(30).choices[0].tokens)


def ask_both(
    service: Service, threads: ThreadPoolExecutor, prompt_tokens: int, max_tokens: int, *phases: str
) -> tuple[Asked, Asked]:
    """Two requests that share no worker, both in one of the phases."""
    first = Asked(service, threads, prompt_tokens, max_tokens)
    second = Asked(service, threads, prompt_tokens, max_tokens)
    lives = [asked.wait_phase(*phases) for asked in (first, second)]
    assert lives[0].prefill_worker != lives[1].prefill_worker
    assert lives[0].decode_worker != lives[1].decode_worker
    return first, second


def not_placed_on(service: Service, worker: WorkerState) -> None:
    reports = [service.client.complete("The color of dog").choices[0].report for _ in range(3)]
    assert worker.worker_id not in {name for each in reports for name in (each.prefill_worker, each.decode_worker)}


def worker_of(asked: Asked, role: Role) -> WorkerState:
    assert asked.live is not None
    name = asked.live.prefill_worker if role is Role.PREFILL else asked.live.decode_worker
    return next(worker for worker in asked.service.status().workers if worker.worker_id == name)


def process_of(service: Service, worker: WorkerState) -> Process:
    return next(process for process in service.processes.values() if process.pid == worker.pid)


def held_by(service: Service, worker: WorkerState) -> tuple[int, int]:
    """Blocks and reservations; not what waits in quarantine for a sender that may wake and write."""
    now = next(each for each in service.status(check_integrity=True).workers if each.worker_id == worker.worker_id)
    assert now.integrity is not None
    return now.integrity.referenced_blocks - now.integrity.quarantined_blocks, now.integrity.reservations


PHASES = {Role.PREFILL: ("prefill_started",), Role.DECODE: ("first_token", "kv_sealed", "decode_started")}
# Prompts that are still computed when the second request is placed, or both would go to the same prefill worker.
SIZES = {Role.PREFILL: (LONG_PROMPT, 20), Role.DECODE: (200, LONG_OUTPUT)}


@contextmanager
def fails_alone(service: Service, asked: Asked, bystander: Asked, role: Role, within_s: float) -> Iterator[WorkerState]:
    """Yields the worker to be harmed; afterwards exactly its request has failed, by WorkerLost, in time."""
    worker = worker_of(asked, role)
    other = worker_of(asked, Role.DECODE if role is Role.PREFILL else Role.PREFILL)
    failed = service.status().failed_requests
    started = time.monotonic()
    yield worker
    error = asked.future.exception(within_s + 1)
    assert time.monotonic() - started < within_s
    assert isinstance(error, WorkerLost)
    assert f"{role} worker {worker.worker_id} was lost" in error.message
    wait_until(lambda: held_by(service, other) == (0, 0), 1, f"nothing held by {other.worker_id}")
    assert bystander.tokens() == bystander.max_tokens
    assert service.status().failed_requests == failed + 1


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
def test_a_killed_worker_fails_its_requests_alone_and_a_new_one_joins(
    service: Service, threads: ThreadPoolExecutor, role: Role
) -> None:
    asked, bystander = ask_both(service, threads, *SIZES[role], *PHASES[role])
    with fails_alone(service, asked, bystander, role, within_s=2) as worker:
        process = process_of(service, worker)
        service.kill(process.name)
    assert process.popen.returncode == -signal.SIGKILL
    wait_until(lambda: len(service.status().workers) == 2 * POOL - 1)
    service.start_worker(f"new-{role}", role)
    service.wait_joined(2 * POOL)
    pid = service.processes[f"new-{role}"].pid
    wait_until(lambda: serves(service, threads, role, pid), 20, "the new worker serving")


def serves(service: Service, threads: ThreadPoolExecutor, role: Role, pid: int) -> bool:
    """Whether one of two requests at once went to the process."""
    both = [Asked(service, threads, 400, 20) for _ in range(2)]
    reports = [asked.future.result(20).choices[0].report for asked in both]
    names = {report.prefill_worker if role is Role.PREFILL else report.decode_worker for report in reports}
    return pid in {worker.pid for worker in service.status().workers if worker.worker_id in names}


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
def test_a_frozen_worker_fails_its_requests_and_rejoins_when_it_wakes(
    service: Service, threads: ThreadPoolExecutor, role: Role
) -> None:
    asked, bystander = ask_both(service, threads, *SIZES[role], *PHASES[role])
    process = process_of(service, worker_of(asked, role))
    try:
        with fails_alone(service, asked, bystander, role, within_s=HEARTBEAT_TIMEOUT_S + 2) as worker:
            process.send(signal.SIGSTOP)
        assert worker.worker_id not in [other.worker_id for other in service.status().workers]
    finally:
        process.send(signal.SIGCONT)
    service.wait_joined(2 * POOL)
    back = next(other for other in service.status().workers if other.pid == process.pid)
    wait_until(lambda: held_by(service, back) == (0, 0), 3, "nothing held by the worker that woke")
    wait_until(service.idle, 3, "nothing in quarantine")
    wait_until(lambda: serves(service, threads, role, process.pid), 20, "the woken worker serving")


# Last: these use up the pools.


@pytest.mark.parametrize(
    ("role", "sizes"), [(Role.PREFILL, {"prompt_tokens": 1200, "max_tokens": 100}), (Role.DECODE, SMALL)]
)
def test_sigterm_lets_live_requests_finish_and_takes_no_new_ones(
    service: Service, threads: ThreadPoolExecutor, role: Role, sizes: dict[str, int]
) -> None:
    """All requests of a size: on a decode worker they end in one step, whose tokens are the worker's last words."""
    asked = [Asked(service, threads, **sizes) for _ in range(4)]
    worker = worker_of(asked[0], role)
    process = process_of(service, worker)
    process.send(signal.SIGTERM)
    wait_until(lambda: any(each.draining for each in service.status().workers), what="a draining worker")
    assert asked[0].live is not None, "it ended before the worker drained"
    not_placed_on(service, worker)
    assert [each.tokens() for each in asked] == [sizes["max_tokens"]] * len(asked)
    assert process.wait_exit(10) == 0
    assert "leaves with live requests" not in process.output
    wait_until(lambda: worker.worker_id not in [each.worker_id for each in service.status().workers])
    process.stop()
    del service.processes[process.name]
