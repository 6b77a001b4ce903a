"""Whatever ends a request, both pools are free within a second; a full pool queues, refuses and never deadlocks."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

import grpc
import pytest
from direct import DirectRouter
from service import ROOT, Service, running_service, unseen_prompt, wait_until

from tandem import rpc
from tandem.errors import DeadlineExceeded, Overloaded, Refused, TransferFailed, Unavailable
from tandem.types import Accepted, Completed, Delta, Event, FinishReason, Role
from tandem.v1 import worker_pb2

BLOCKS, BLOCK = 48, 16
# Fills the decode pool, alone.
pytestmark = pytest.mark.alone

EVERYTHING = {"prompt_tokens": 10, "max_tokens": BLOCKS * BLOCK - 10}
MAX_WAITING = 4
AT_ONCE_S = 1.0


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running_service(
        tmp_path_factory.mktemp("release"),
        # Small steps: a long prompt takes long enough to be caught in mid-prefill.
        engine={"num_blocks": BLOCKS, "max_step_tokens": 4},
        worker={"max_waiting_reservations": MAX_WAITING},
        router={"heartbeat_interval_s": 0.05},
    ) as service:
        yield service


@pytest.fixture(autouse=True)
def _idle(service: Service) -> Iterator[None]:
    yield
    wait_until(service.idle, AT_ONCE_S, "no orphan")
    assert service.client.complete("The color of dog").text == " can vary widely"


def held(service: Service, role: Role) -> int:
    return service.integrity_of(role).referenced_blocks


def waiting(service: Service) -> int:
    return service.worker_of(Role.DECODE).load.waiting_reservations


@contextmanager
def asking(service: Service, prompt_tokens: int, max_tokens: int) -> Iterator[Iterator[Event]]:
    """An accepted request; leaving the context leaves its loop."""
    with service.client.generate(unseen_prompt(prompt_tokens), max_tokens=max_tokens, ignore_eos=True) as answer:
        events = iter(answer)
        assert isinstance(next(events), Accepted)
        yield events


def output_of(events: Iterator[Event]) -> int:
    """Reads to the end; the number of tokens."""
    tokens, last = 0, None
    for last in events:
        tokens += len(last.tokens) if isinstance(last, Delta) else 0
    assert isinstance(last, Completed)
    return tokens


def reach(service: Service, phase: str, events: Iterator[Event]) -> None:
    if phase == "decoding":
        for _ in range(3):
            assert isinstance(next(events), Delta)
        wait_until(lambda: held(service, Role.DECODE) > 0)
    elif phase == "prefilling":
        wait_until(lambda: [live.phase for live in service.status().requests] == ["prefill_started"], what=phase)
        assert held(service, Role.PREFILL) > 0
        assert held(service, Role.DECODE) > 0


SIZES = {"accepted": (400, 300), "prefilling": (700, 20), "decoding": (10, 700)}


@pytest.mark.parametrize("phase", SIZES)
def test_leaving_the_loop_frees_both_pools(service: Service, phase: str) -> None:
    cancelled = service.status().cancelled_requests
    with asking(service, *SIZES[phase]) as events:
        reach(service, phase, events)
    wait_until(service.idle, AT_ONCE_S, "both pools free")
    assert service.status().cancelled_requests == cancelled + 1, "it had ended before it was left"


CLIENT = """
import sys, tandem
for event in tandem.Client(sys.argv[1]).generate([int(id) for id in sys.argv[2].split(",")], max_tokens=20,
                                                 ignore_eos=True):
    print(type(event).__name__, flush=True)
"""


def test_a_killed_client_frees_both_pools(service: Service) -> None:
    cancelled = service.status().cancelled_requests
    ids = ",".join(map(str, unseen_prompt(700)))
    command = [sys.executable, "-c", CLIENT, service.address, ids]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as client:
        try:
            assert client.stdout is not None
            assert client.stdout.readline() == "Accepted\n"
            reach(service, "prefilling", iter(()))
        finally:
            client.kill()
    wait_until(service.idle, AT_ONCE_S, "both pools free")
    assert service.status().cancelled_requests == cancelled + 1


@pytest.mark.parametrize("phase", ["prefilling", "decoding", "waiting"])
def test_a_deadline_frees_both_pools(service: Service, phase: str) -> None:
    prompt_tokens, max_tokens = SIZES.get(phase, (10, 20))
    timeout_s = 0.1 if phase == "prefilling" else 0.3
    with ExitStack() as stack:
        if phase == "waiting":
            next(stack.enter_context(asking(service, **EVERYTHING)))
        started = time.monotonic()
        answer = service.client.generate(
            unseen_prompt(prompt_tokens), max_tokens=max_tokens, ignore_eos=True, timeout_s=timeout_s
        )
        seen: set[type[Event]] = set()
        with pytest.raises(DeadlineExceeded):
            seen.update(type(event) for event in answer)
        assert timeout_s - 0.05 < time.monotonic() - started < timeout_s + 1
        assert (Delta in seen) == (phase == "decoding")
        assert phase != "waiting" or held(service, Role.DECODE) == BLOCKS
    wait_until(service.idle, AT_ONCE_S, "both pools free")


def test_leaving_while_waiting_for_blocks_gives_up_the_place_alone(service: Service) -> None:
    with asking(service, 10, BLOCKS * BLOCK // 2) as events:
        next(events)
        with asking(service, **EVERYTHING):
            wait_until(lambda: waiting(service) == 1, what="a reserve call that waits")
        wait_until(lambda: waiting(service) == 0, AT_ONCE_S, "nobody waiting")
        assert held(service, Role.DECODE) > 0
        assert output_of(events) == BLOCKS * BLOCK // 2 - 1


def test_a_full_pool_queues_refuses_and_then_serves(service: Service) -> None:
    """Each of the waiting needs more than half the pool: they are served one after the other."""
    with ExitStack() as stack:
        holder = stack.enter_context(ExitStack())
        next(holder.enter_context(asking(service, **EVERYTHING)))
        queued = [stack.enter_context(asking(service, 400, 8)) for _ in range(MAX_WAITING)]
        wait_until(lambda: waiting(service) == MAX_WAITING, what="a full queue")
        with pytest.raises(Overloaded, match=f"{MAX_WAITING} requests wait for KV blocks") as caught:
            service.client.complete(unseen_prompt(400), max_tokens=8)
        assert caught.value.retry_after_ms
        holder.close()
        assert [output_of(events) for events in queued] == [8] * MAX_WAITING


def test_a_single_token_frees_both_pools(service: Service) -> None:
    assert service.client.complete(unseen_prompt(200), max_tokens=1).usage.output_tokens == 1
    wait_until(service.idle, AT_ONCE_S, "both pools free")


def test_a_first_token_that_ends_the_request_abandons_its_transfer(service: Service) -> None:
    """Chunks of the prompt were on their way already."""
    prompt = unseen_prompt(400)
    first = service.client.complete(prompt, max_tokens=1, ignore_eos=True).choices[0].tokens[0].id
    done = service.client.complete(prompt, max_tokens=50, stop_token_ids=(first,))
    assert (done.choices[0].reason, done.usage.output_tokens) == (FinishReason.STOP, 1)
    wait_until(service.idle, AT_ONCE_S, "both pools free")
    output = "".join(process.output for process in service.processes.values())
    assert f"[{done.request_id}] transfer failed" not in output
    assert f"[{done.request_id}] its transfer" not in output


# The decode worker by itself: what a router or a prefill worker that went wrong leaves behind.


@pytest.fixture
def direct(service: Service) -> Iterator[DirectRouter]:
    with DirectRouter(service.worker_of(Role.DECODE)) as direct:
        yield direct


def reservations(service: Service) -> int:
    return service.integrity_of(Role.DECODE).reservations


def test_a_reservation_whose_prefill_never_comes_ends_with_its_lease(service: Service, direct: DirectRouter) -> None:
    started = time.monotonic()
    direct.reserve(direct.request("r", lease_ms=300))
    assert (reservations(service), held(service, Role.DECODE)) == (1, 3)
    wait_until(service.idle, 2.0, "the end of the lease")
    assert time.monotonic() - started >= 0.3


LONG = {"prompt_tokens": 10, "max_tokens": 700}


@pytest.mark.parametrize("transport", ["grpc", "shm"])
def test_a_transfer_that_stops_ends_with_the_lease(service: Service, direct: DirectRouter, transport: str) -> None:
    request = direct.request("r", lease_ms=300, transport=transport)
    opening, *_ = direct.frames(request, direct.reserve(request))
    with pytest.raises(TransferFailed, match="ended already"):
        direct.fall_silent(transport, [opening])
    wait_until(service.idle, AT_ONCE_S, "no orphan")


def decoding(direct: DirectRouter, name: str, **order: int) -> worker_pb2.Reservation:
    """A request that somebody else prefilled; its first token has come."""
    request = direct.request(name, **LONG, **order)
    reservation = direct.reserve(request)
    direct.push(direct.frames(request, reservation))
    assert next(direct.tokens).requests[0].position == 1
    return reservation


def test_a_decoding_request_that_nobody_renews_ends_with_its_lease(service: Service, direct: DirectRouter) -> None:
    """As one whose Abort got lost: it would decode to max_tokens for nobody."""
    reservation = decoding(direct, "r", lease_ms=60_000)
    direct.renew(reservation, lease_ms=50)
    last = direct.last_tokens()
    assert (last.failure.code, last.position) == ("unavailable", 0)
    assert "did not renew" in last.failure.message
    wait_until(service.idle, AT_ONCE_S, "its blocks free")


def test_a_decode_worker_ends_a_request_at_its_deadline_itself(service: Service, direct: DirectRouter) -> None:
    decoding(direct, "r", deadline_ms=200)
    assert direct.last_tokens().failure.code == "deadline_exceeded"
    wait_until(service.idle, AT_ONCE_S, "its blocks free")


def test_a_deadline_counts_before_the_seal_too(service: Service, direct: DirectRouter) -> None:
    direct.reserve(direct.request("r", deadline_ms=100))
    assert direct.last_tokens().failure.code == "deadline_exceeded"
    wait_until(service.idle, AT_ONCE_S, "its blocks free")


def test_an_abort_that_overtakes_its_reserve_call_still_counts(service: Service, direct: DirectRouter) -> None:
    direct.abort("r", attempt=1)
    for attempt in (0, 1):
        with pytest.raises(Unavailable, match="aborted before its reservation"):
            direct.reserve(direct.request("r", attempt))
    direct.reserve(direct.request("r", attempt=2))
    assert reservations(service) == 1
    direct.abort("r", attempt=2)


@pytest.mark.parametrize("transport", ["", "local", "pigeon"])
def test_a_worker_promises_only_what_it_can_receive(direct: DirectRouter, transport: str) -> None:
    with pytest.raises(Refused, match="cannot take KV by"):
        direct.reserve(direct.request("r", transport=transport))


def test_the_end_of_a_routers_subscription_frees_its_reservations(service: Service) -> None:
    with DirectRouter(service.worker_of(Role.DECODE)) as direct:
        direct.reserve(direct.request("r"))
        assert reservations(service) == 1
    wait_until(service.idle, AT_ONCE_S, "the reservation freed")


def test_a_newer_attempt_replaces_an_older_one_and_the_older_is_ignored(service: Service, direct: DirectRouter) -> None:
    requests = [direct.request("r", attempt) for attempt in (0, 1)]
    old, new = [direct.reserve(request) for request in requests]
    assert reservations(service) == 1
    with pytest.raises(TransferFailed, match="no such reservation"):
        direct.push(direct.frames(requests[0], old))
    with pytest.raises(Refused, match="has attempt 1 here already"):
        direct.reserve(requests[0])
    direct.abort("r", attempt=0)
    assert reservations(service) == 1
    assert direct.push(direct.frames(requests[1], new)).frames == 4
    message = next(direct.tokens).requests[0]
    assert (message.attempt, message.position) == (1, 1)
    wait_until(lambda: reservations(service) == 0, what="its last token")


def test_abort_ends_its_attempt(service: Service, direct: DirectRouter) -> None:
    request = direct.request("r", attempt=1)
    reservation = direct.reserve(request)
    direct.abort("r", attempt=1)
    wait_until(service.idle, AT_ONCE_S, "the reservation freed")
    with pytest.raises(TransferFailed, match="no such reservation"):
        direct.push(direct.frames(request, reservation))


@pytest.mark.parametrize("phase", ["prefilling", "decoding"])
def test_an_abort_from_elsewhere_ends_the_request_with_one_error(
    service: Service, direct: DirectRouter, phase: str
) -> None:
    """Its router did not send it, and must not wait for tokens until the deadline."""
    with asking(service, *SIZES[phase]) as events:
        reach(service, phase, events)
        [live] = service.status().requests
        direct.abort_named(live.request_id, attempt=9)
        with pytest.raises(Unavailable, match="aborted"):
            output_of(events)
        wait_until(service.idle, AT_ONCE_S, "both pools free")


@contextmanager
def full_pool(service: Service, direct: DirectRouter) -> Iterator[Callable[[], None]]:
    """Yields what empties it."""
    direct.reserve(direct.request("full", **EVERYTHING))
    with suppress(Refused):
        yield lambda: direct.abort("full", 0)
    direct.abort("full", 0)


def test_abort_reaches_a_request_that_waits_for_blocks(service: Service, direct: DirectRouter) -> None:
    with full_pool(service, direct):
        call = direct.reserve_later(direct.request("r", attempt=1))
        wait_until(lambda: waiting(service) == 1)
        direct.abort("r", attempt=0)
        assert waiting(service) == 1
        direct.abort("r", attempt=1)
        with pytest.raises(grpc.RpcError) as caught:
            call.result()
        assert isinstance(rpc.error_from_rpc(caught.value), Unavailable)
        wait_until(lambda: waiting(service) == 0, AT_ONCE_S, "nobody waiting")


def test_of_two_attempts_that_wait_for_blocks_the_newer_stays(service: Service, direct: DirectRouter) -> None:
    with full_pool(service, direct) as empty:
        calls = [direct.reserve_later(direct.request("r", 0))]
        wait_until(lambda: waiting(service) == 1)
        calls.append(direct.reserve_later(direct.request("r", 1)))
        wait_until(calls[0].done, AT_ONCE_S, "the end of the older attempt")
        empty()
        assert calls[1].result().reservation_id
        with pytest.raises(grpc.RpcError, match=r"attempt 1 of request r-.* replaces this one"):
            calls[0].result()
        assert reservations(service) == 1
        direct.abort("r", 1)
