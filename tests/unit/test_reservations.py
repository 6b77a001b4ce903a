"""Reservations that a colocated prefill computes in, and the stream that takes tokens to a router."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest
from scripted_worker import eventually

from decode_worker.reserve_queue import AbortedAttempts
from decode_worker.token_stream import MAX_BATCH, TokenStream
from kv_transfer.base import TransferSummary
from tandem.config import parse_config
from tandem.engine.sequence import EngineEvent, Failed, NewToken
from tandem.errors import Cancelled, TransferFailed, Unavailable
from tandem.types import EngineRequest, FinishReason, SamplingParams, Token
from tandem.v1 import worker_pb2
from tandem.worker.engine_thread import EngineThread
from tandem.worker.host import WorkerHost
from tandem.worker.local_reservation import LocalReservation
from tandem.worker.reservation import Emit, Reservation, ReserveOrder

REQUEST = EngineRequest("r", (5, 6, 7), SamplingParams(max_tokens=3, ignore_eos=True))
CONFIG = parse_config({"engine": {"kv_memory_mib": 4, "threads": 1}})
SUMMARY = TransferSummary(0, 0, 0.0)

Make = Callable[[], LocalReservation]


@pytest.fixture
def sent() -> list[worker_pb2.RequestTokens]:
    return []


@pytest.fixture
async def host() -> AsyncIterator[WorkerHost]:
    thread = EngineThread(CONFIG)
    thread.start()
    yield WorkerHost(CONFIG, thread, frozenset())
    thread.stop()


def reserved(host: WorkerHost, emit: Emit, local: bool = True) -> Reservation:
    table = host.engine.reserve(REQUEST, local)
    assert table is not None
    order = ReserveOrder(REQUEST, host.engine.name_blocks(REQUEST), "router", local, lease_s=60, deadline=None)
    return host.reservations.make(order, table, emit)


@pytest.fixture
def make(host: WorkerHost, sent: list[worker_pb2.RequestTokens]) -> Make:
    return lambda: host.reservations.find_local(reserved(host, sent.append).id, REQUEST)


def ignore(event: EngineEvent) -> None:
    pass


async def test_tokens_that_overtake_the_handoff_wait_for_it(make: Make, sent: list[worker_pb2.RequestTokens]) -> None:
    """The engine may finish a short answer before the event loop has opened the handoff."""
    reservation = make()
    reservation.lend(ignore)
    reservation.listener(NewToken(1, Token(8), None))
    reservation.listener(NewToken(2, Token(9), FinishReason.LENGTH))
    assert sent == []
    assert reservation.state == "prefilling", "the handoff must still find it"
    await reservation.sealed(7, SUMMARY)
    assert [message.position for message in sent] == [1, 2]
    assert reservation.state == "ended"


async def test_a_reservation_for_kv_from_elsewhere_is_not_lent(host: WorkerHost) -> None:
    reservation = reserved(host, lambda message: None, local=False)
    with pytest.raises(TransferFailed, match="for KV from another worker"):
        host.reservations.find_local(reservation.id, REQUEST)
    assert reservation.state == "reserved"


async def test_the_end_of_a_lent_reservation_reaches_the_prefill_that_waits_for_its_token(make: Make) -> None:
    """The engine drops an aborted sequence without a word."""
    events: list[EngineEvent] = []
    reservation = make()
    reservation.lend(events.append)
    reservation.renew(0.01)
    await eventually(lambda: reservation.state == "ended")
    (event,) = events
    assert isinstance(event, Failed)
    assert isinstance(event.error, Unavailable)


async def test_a_local_handoff_into_a_reservation_that_has_ended_fails(
    make: Make, sent: list[worker_pb2.RequestTokens]
) -> None:
    """Between the first token, which the prefill has told, and the seal."""
    reservation = make()
    reservation.lend(ignore)
    reservation.listener(NewToken(1, Token(8), None))
    reservation.end(Cancelled("the request was aborted"))
    with pytest.raises(TransferFailed, match="ended already"):
        await reservation.sealed(7, SUMMARY)
    assert sent == []


def test_of_many_aborts_the_newest_are_remembered() -> None:
    aborted = AbortedAttempts(most=2)
    for name in ("a", "r", "b"):
        aborted.note(name, 0)
    aborted.note("r", 1)
    aborted.note("r", 0)
    aborted.check(replace(REQUEST, request_id="a"))
    aborted.check(replace(REQUEST, attempt=2))
    with pytest.raises(Unavailable):
        aborted.check(replace(REQUEST, attempt=1))


async def test_a_reservation_is_lent_once(make: Make) -> None:
    reservation = make()
    reservation.lend(ignore)
    with pytest.raises(TransferFailed, match="prefilling already"):
        reservation.lend(ignore)


async def test_a_reservation_takes_one_transfer(host: WorkerHost) -> None:
    reservation = reserved(host, lambda message: None, local=False)
    reservation.claim()
    assert reservation.state == "receiving"
    with pytest.raises(TransferFailed, match="already has its transfer"):
        reservation.claim()
    reservation.end()


async def test_a_router_that_did_not_read_for_long_gets_messages_of_bounded_size() -> None:
    stream = TokenStream()
    for position in range(MAX_BATCH + 1):
        stream.put(worker_pb2.RequestTokens(request_id="r", position=position))
    sizes = []
    while sum(sizes) <= MAX_BATCH:
        batch = await stream.next_batch()
        assert batch is not None
        sizes.append(len(batch.requests))
    assert sizes == [MAX_BATCH, 1]
    stream.close()
    assert await stream.next_batch() is None
