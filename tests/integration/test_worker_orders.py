"""`tandem drain` and `tandem roles` on a service that serves: no request notices."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
from command_line import NOBODY, one_line, tandem
from service import Process, Service, running_service, wait_until

from tandem.client import Client, WorkerState
from tandem.errors import TandemError
from tandem.types import Delta, Event, FinishReason, RequestReport, Role, SamplingParams

SHORT, LONG = (SamplingParams(max_tokens=count, ignore_eos=True) for count in (8, 1500))


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Three workers that tests do not send away."""
    router = {"heartbeat_interval_s": 0.05}
    with running_service(tmp_path_factory.mktemp("orders"), prefill=0, decode=0, colocated=3, router=router) as running:
        yield running


def order(service: Service, *words: str) -> str:
    ran = tandem(*words, "--router", service.address)
    assert ran.exit_code == 0, ran.stderr
    return ran.stdout


def state_of(service: Service, worker_id: str) -> WorkerState:
    return next(worker for worker in service.status().workers if worker.worker_id == worker_id)


def ids(service: Service) -> set[str]:
    return {worker.worker_id for worker in service.status().workers}


@contextmanager
def one_more(service: Service, role: str) -> Iterator[tuple[str, Process]]:
    """A worker for one test; yields its id too."""
    process = service.start_worker("one more", role)
    service.wait_joined(4)
    yield next(worker.worker_id for worker in service.status().workers if worker.pid == process.pid), process
    service.processes.pop("one more").stop()
    service.wait_joined(3)


def report_of(service: Service, prompt: list[int]) -> RequestReport:
    return service.client.complete(prompt, sampling=SHORT).choices[0].report


@contextmanager
def decoding(service: Service, prompt: list[int]) -> Iterator[Callable[[], list[int]]]:
    """A request that is being decoded; what is yielded reads its answer to the end."""
    with service.client.generate(prompt, sampling=LONG) as answer:
        events, told = iter(answer), list[Event]()
        while not any(isinstance(event, Delta) and event.tokens for event in told[1:]):
            told.append(next(events))

        def rest() -> list[int]:
            told.extend(events)
            deltas = [event for event in told if isinstance(event, Delta)]
            assert deltas[-1].reason is FinishReason.LENGTH
            return [token.id for delta in deltas for token in delta.tokens]

        yield rest


@contextmanager
def steady_load(address: str, clients: int = 3) -> Iterator[list[int]]:
    """Requests one after another until the block ends; yields their token counts. None may fail."""
    stop, done, failures = threading.Event(), list[int](), list[TandemError]()

    def ask(number: int) -> None:
        with Client(address) as client:
            while not stop.is_set():
                try:
                    (choice,) = client.complete([3 + number] * 40, sampling=SHORT).choices
                    done.append(len(choice.tokens))
                except TandemError as error:
                    failures.append(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield done
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
    assert failures == []
    assert set(done) == {SHORT.max_tokens}


def test_roles_change_while_requests_are_served(service: Service) -> None:
    expected = [token.id for token in service.client.complete([7] * 33, sampling=LONG).choices[0].tokens]
    wait_until(service.idle, what="an idle service")
    with ExitStack() as stack:
        rest = stack.enter_context(decoding(service, [7] * 33))
        home = service.status().requests[0].decode_worker
        done = stack.enter_context(steady_load(service.address))
        assert order(service, "roles", home, "prefill") == f"{home} plays prefill\n"
        for other in ids(service) - {home}:
            order(service, "roles", other, "decode")
        assert home in {request.decode_worker for request in service.status().requests}, "it still decodes one"
        served = len(done)
        wait_until(lambda: len(done) > served + 6, 30, "requests that are placed anew")
        report = report_of(service, [9] * 20)
        assert (report.prefill_worker, report.transport) == (home, "shm")
        assert state_of(service, report.decode_worker).roles == {Role.DECODE}
        for worker in ids(service):
            order(service, "roles", worker, "prefill,decode")
        assert rest() == expected, "what is live of a dropped role goes on to its end"
    assert {worker.roles for worker in service.status().workers} == {frozenset(Role)}
    wait_until(service.idle, what="everything given back")


def test_orders_that_cannot_be_carried_out(service: Service) -> None:
    with one_more(service, "prefill") as (worker, process):
        for words, code, told in (
            (["drain", "nobody"], 2, "no worker 'nobody' has joined; joined: decode+prefill-"),
            (["roles", "nobody", "prefill"], 2, "no worker 'nobody' has joined; joined: "),
            (["roles", worker, "cook"], 2, "there is no role 'cook'; roles are prefill, decode"),
            (["roles", worker, ""], 2, "there is no role ''; roles are "),
            (
                ["roles", worker, "decode"],
                2,
                f"{worker} cannot play decode: its process has services for prefill",
            ),
        ):
            ran = tandem(*words, "--router", service.address)
            assert (ran.exit_code, told in one_line(ran)) == (code, True), ran.stderr
        assert tandem("drain", worker, "--router", NOBODY).exit_code == 1
        assert state_of(service, worker).roles == {Role.PREFILL}
        assert not state_of(service, worker).draining
        process.terminate()


def test_a_drained_worker_finishes_what_it_has_and_leaves(service: Service) -> None:
    with one_more(service, "both") as (worker, process), ExitStack() as stack:
        for number in range(4):  # one for each worker: the others are fuller
            rest = stack.enter_context(decoding(service, [11 + number] * 20))
            if service.status().requests[-1].decode_worker == worker:
                break
        assert service.status().requests[-1].decode_worker == worker
        assert "it leaves when its live requests have ended" in order(service, "drain", worker, "--wait", "0")
        assert state_of(service, worker).draining
        late = tandem("drain", worker, "--wait", "0.05", "--router", service.address)
        assert (late.exit_code, "still has live requests after 0.05 s" in one_line(late)) == (1, True)
        assert report_of(service, [17] * 20).decode_worker != worker
        assert len(rest()) == LONG.max_tokens
        assert process.wait_exit(30) == 0


def test_drain_returns_when_the_worker_has_left(service: Service) -> None:
    """Of the requests meanwhile none fails."""
    with one_more(service, "both") as (worker, process):
        with steady_load(service.address) as done:
            wait_until(lambda: len(done) > 3, what="requests")
            assert order(service, "drain", worker) == f"{worker} has left\n"
            assert worker not in ids(service)
        assert process.wait_exit(30) == 0
