"""Reservations that a colocated prefill computes in, and the stream that takes tokens to a router."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest

from decode_worker.aborted import Aborted
from decode_worker.order import Order
from decode_worker.reservations import Reservation
from decode_worker.subscriptions import MAX_BATCH, Subscription
from kv_transfer.base import TransferSummary
from tandem.config import parse_config
from tandem.engine.sequence import EngineEvent, Failed, NewToken, Sequence
from tandem.errors import Cancelled, TransferFailed, Unavailable
from tandem.types import EngineRequest, FinishReason, SamplingParams, Token
from tandem.v1 import worker_pb2
from tandem.worker.engine_thread import EngineThread
from tandem.worker.host import WorkerHost

REQUEST = EngineRequest("r", (5, 6, 7), SamplingParams(max_tokens=3, ignore_eos=True))
CONFIG = parse_config({"engine": {"kv_memory_mib": 4, "threads": 1}})
SUMMARY = TransferSummary(0, 0, 0.0)

Make = Callable[..., Reservation]


@pytest.fixture
def sent() -> list[worker_pb2.RequestTokens]:
    return []


@pytest.fixture
async def make(sent: list[worker_pb2.RequestTokens]) -> AsyncIterator[Make]:
    thread = EngineThread(CONFIG)
    thread.start()
    host = WorkerHost(CONFIG, thread, frozenset())

    def reservation(local: bool = True) -> Reservation:
        table = host.engine.reserve(REQUEST, local)
        assert table is not None
        order = Order(REQUEST, host.engine.name_blocks(REQUEST), "router", local, lease_s=60, deadline=None)
        return Reservation(host, order, table, sent.append, lambda reservation: None)

    yield reservation
    thread.stop()


def _sequence(reservation: Reservation) -> Sequence:
    return Sequence(REQUEST, lambda event: None, decode_here=True, table=reservation.table)


async def test_tokens_that_overtake_the_handoff_wait_for_it(make: Make, sent: list[worker_pb2.RequestTokens]) -> None:
    """The engine may finish a short answer before the event loop has opened the handoff."""
    reservation = make()
    reservation.begin(_sequence(reservation))
    reservation.listener(NewToken(1, Token(8), None))
    reservation.listener(NewToken(2, Token(9), FinishReason.LENGTH))
    assert sent == []
    assert reservation.state == "decoding", "the handoff must still find it"
    await reservation.sealed(7, SUMMARY)
    assert [message.position for message in sent] == [1, 2]
    assert reservation.state == "ended"


async def test_a_reservation_for_kv_from_elsewhere_is_not_lent(make: Make) -> None:
    reservation = make(local=False)
    with pytest.raises(TransferFailed, match="for KV from another worker"):
        reservation.begin(_sequence(reservation))
    assert reservation.state == "promised"


async def test_the_end_of_a_lent_reservation_reaches_the_prefill_that_waits_for_its_token(make: Make) -> None:
    """The engine drops an aborted sequence without a word."""
    events: list[EngineEvent] = []
    reservation = make()
    sequence = _sequence(reservation)
    sequence.listener = events.append
    reservation.begin(sequence)
    reservation.renew(0.01)
    await asyncio.sleep(0.05)
    assert reservation.state == "ended"
    (event,) = events
    assert isinstance(event, Failed)
    assert isinstance(event.error, Unavailable)


async def test_a_local_handoff_into_a_reservation_that_has_ended_fails(
    make: Make, sent: list[worker_pb2.RequestTokens]
) -> None:
    """Between the first token, which the prefill has told, and the seal."""
    reservation = make()
    reservation.begin(_sequence(reservation))
    reservation.listener(NewToken(1, Token(8), None))
    reservation.end(Cancelled("the request was aborted"))
    with pytest.raises(TransferFailed, match="ended already"):
        await reservation.sealed(7, SUMMARY)
    assert sent == []


def test_of_many_aborts_the_newest_are_remembered() -> None:
    aborted = Aborted(most=2)
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
    reservation.begin(_sequence(reservation))
    with pytest.raises(TransferFailed, match="decoding already"):
        reservation.begin(_sequence(reservation))


async def test_a_router_that_did_not_read_for_long_gets_messages_of_bounded_size() -> None:
    subscription = Subscription()
    for position in range(MAX_BATCH + 1):
        subscription.put(worker_pb2.RequestTokens(request_id="r", position=position))
    sizes = []
    while sum(sizes) <= MAX_BATCH:
        batch = await subscription.next_batch()
        assert batch is not None
        sizes.append(len(batch.requests))
    assert sizes == [MAX_BATCH, 1]
    subscription.close()
    assert await subscription.next_batch() is None
