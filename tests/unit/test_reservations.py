"""Reservations that a colocated prefill computes in, and the stream that takes tokens to a router."""

from collections.abc import Callable

import pytest

from decode_worker.reservations import Reservation
from decode_worker.subscriptions import MAX_BATCH, Subscription
from kv_transfer.base import TransferSummary
from tandem.config import parse_config
from tandem.engine.sequence import NewToken, Sequence
from tandem.errors import TransferFailed
from tandem.types import EngineRequest, FinishReason, SamplingParams, Token
from tandem.v1 import worker_pb2
from tandem.worker.engine_thread import EngineThread
from tandem.worker.host import WorkerHost

REQUEST = EngineRequest("r", (5, 6, 7), SamplingParams(max_tokens=3, ignore_eos=True))
CONFIG = parse_config({"engine": {"kv_memory_mib": 4, "threads": 1}})
SUMMARY = TransferSummary(0, 0, 0.0)

Make = Callable[[], Reservation]


@pytest.fixture
def sent() -> list[worker_pb2.RequestTokens]:
    return []


@pytest.fixture
async def make(sent: list[worker_pb2.RequestTokens]) -> Make:
    host = WorkerHost(CONFIG, EngineThread(CONFIG), frozenset())

    def reservation() -> Reservation:
        table = host.engine.reserve(REQUEST, True)
        assert table is not None
        return Reservation(host, REQUEST, table, "router", sent.append, lambda reservation: None)

    return reservation


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
