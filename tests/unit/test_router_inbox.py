from __future__ import annotations

import asyncio
import tracemalloc

import grpc
import pytest

from router.life.events import BURST, EmitPacer
from router.life.inbox import MOST_AT_ONCE, Arrival, Inbox, Lost, Stage
from router.life.output import TokenStep
from router.pool.subscriptions import MOST_IN_A_PASS, TokenSubscription
from tandem.errors import InternalError, TandemError, Unavailable, WorkerLost
from tandem.types import FinishReason, Role
from tandem.v1 import common_pb2, worker_pb2


class Reader:
    """An inbox, and who takes from it."""

    def __init__(self, max_tokens: int = 10, pacer: EmitPacer | None = None, given: tuple[int, ...] = ()) -> None:
        self._offered = asyncio.Event()
        self.failures: list[TandemError] = []
        self.inbox = Inbox(
            max_tokens, lambda: 0.0, pacer or EmitPacer(), self._offered.set, self.failures.append, given
        )

    @property
    def offered(self) -> bool:
        return self._offered.is_set()

    async def take(self) -> list[TokenStep]:
        """What is offered next."""
        await asyncio.wait_for(self._offered.wait(), 5)
        self._offered.clear()
        return self.inbox.take()

    # The subscription's side.

    def put(self, message: worker_pb2.RequestTokens) -> None:
        self.inbox.put(message)

    def reported_end(self) -> None:
        pass


def spend(pacer: EmitPacer) -> None:
    """Whoever asks from now on waits."""
    for _ in range(BURST):
        pacer.ask(lambda: None)


def first(reason: FinishReason | None = None, token_id: int = 0) -> worker_pb2.FirstToken:
    return worker_pb2.FirstToken(token=common_pb2.Token(id=token_id), finish_reason=finish(reason))


def decoded(position: int, reason: FinishReason | None = None) -> worker_pb2.RequestTokens:
    token = common_pb2.Token(id=position)
    return worker_pb2.RequestTokens(position=position, tokens=[token], finish_reason=finish(reason))


def finish(reason: FinishReason | None) -> common_pb2.FinishReason:
    return common_pb2.FINISH_REASON_LENGTH if reason else common_pb2.FINISH_REASON_UNSPECIFIED


def taken(steps: list[TokenStep]) -> list[int]:
    return [token.id for step in steps for token in step.tokens]


LAST = FinishReason.LENGTH
PREFILL_LOST = Lost(Role.PREFILL, WorkerLost("prefill"))
DECODE_LOST = Lost(Role.DECODE, WorkerLost("decode"))
FAILURE = worker_pb2.RequestTokens(failure=common_pb2.Failure(code="unavailable", message="torn"))


@pytest.mark.parametrize(
    ("arrivals", "state", "tokens"),
    [
        ([first()], Stage.HANDING_OFF, [0]),
        ([first(), worker_pb2.Sealed()], Stage.DECODING, [0]),
        ([first(), decoded(1), worker_pb2.Sealed()], Stage.DECODING, [0, 1]),
        ([first(), decoded(1), decoded(2, LAST)], Stage.ENDED, [0, 1, 2]),
        ([decoded(1), first(), decoded(2, LAST)], Stage.ENDED, [0, 1, 2]),
        ([decoded(1), decoded(2, LAST), first()], Stage.ENDED, [0, 1, 2]),
        ([first(LAST)], Stage.ENDED, [0]),
        ([decoded(1), decoded(2, LAST)], Stage.ALL_BUT_FIRST, []),
        # Who is not needed may go, and what comes too late is nothing.
        ([first(), worker_pb2.Sealed(), PREFILL_LOST], Stage.DECODING, [0]),
        ([first(), decoded(1), PREFILL_LOST], Stage.DECODING, [0, 1]),
        ([decoded(1), decoded(2, LAST), DECODE_LOST, first()], Stage.ENDED, [0, 1, 2]),
        ([first(), decoded(1, LAST), PREFILL_LOST, DECODE_LOST, decoded(2)], Stage.ENDED, [0, 1]),
        ([first(LAST), PREFILL_LOST, DECODE_LOST, FAILURE, worker_pb2.Sealed()], Stage.ENDED, [0]),
        ([first(), first(), decoded(1)], Stage.DECODING, [0, 1]),
    ],
)
async def test_what_comes_in_any_order(arrivals: list[Arrival], state: Stage, tokens: list[int]) -> None:
    reader = Reader()
    for arrival in arrivals:
        reader.inbox.put(arrival)
    assert (reader.inbox.state, reader.failures) == (state, [])
    assert taken(await reader.take() if tokens else reader.inbox.take()) == tokens


@pytest.mark.parametrize(
    ("arrivals", "error", "words"),
    [
        ([PREFILL_LOST], WorkerLost, "prefill"),
        ([DECODE_LOST, PREFILL_LOST], WorkerLost, "decode"),
        ([decoded(1), PREFILL_LOST], WorkerLost, "prefill"),
        ([decoded(1), DECODE_LOST], WorkerLost, "decode"),
        ([decoded(1, LAST), PREFILL_LOST, first()], WorkerLost, "prefill"),
        ([first(), PREFILL_LOST, decoded(1)], WorkerLost, "prefill"),
        ([first(), worker_pb2.Sealed(), DECODE_LOST, decoded(1)], WorkerLost, "decode"),
        ([FAILURE, first()], Unavailable, "torn"),
        ([first(), decoded(1), FAILURE, decoded(2)], Unavailable, "torn"),
        ([first(), decoded(2)], InternalError, "position 2 where 1 was due"),
        ([first(), *map(decoded, range(1, 11))], InternalError, "more than max_tokens=10"),
    ],
)
async def test_the_first_failure_ends_it(arrivals: list[Arrival], error: type[TandemError], words: str) -> None:
    reader = Reader()
    for arrival in arrivals:
        reader.inbox.put(arrival)
    assert reader.inbox.state is Stage.FAILED
    assert [(type(each), words in str(each)) for each in reader.failures] == [(error, True)]
    assert reader.inbox.take() == []


async def test_a_first_token_that_the_client_has_is_not_given_again_and_must_be_the_same() -> None:
    reader, other = Reader(given=(7,)), Reader(given=(7,))
    reader.inbox.put(first(token_id=7))
    reader.inbox.put(decoded(1))
    assert taken(await reader.take()) == [1]
    other.inbox.put(first(token_id=6))
    assert [str(each) for each in other.failures] == ["the first token was 7, the second attempt says 6"]


async def test_steps_that_come_before_the_turn_are_taken_together() -> None:
    pacer = EmitPacer()
    reader = Reader(pacer=pacer)
    spend(pacer)
    reader.inbox.put(first())
    assert taken(await reader.take()) == [0]  # without a turn
    for position in range(1, 4):
        reader.inbox.put(decoded(position, LAST if position == 3 else None))
    steps = await reader.take()
    assert taken(steps) == [1, 2, 3]
    assert steps[-1].finish_reason is FinishReason.LENGTH


async def test_a_turn_without_anything_to_hand_over_wakes_nobody() -> None:
    """The first token took along what was decoded before it, although a turn was asked for."""
    pacer = EmitPacer()
    reader = Reader(pacer=pacer)
    reader.inbox.put(first())
    spend(pacer)
    reader.inbox.put(decoded(1))
    assert taken(await reader.take()) == [0, 1]
    later = asyncio.Event()
    pacer.ask(later.set)  # its turn comes after the inbox's
    await asyncio.wait_for(later.wait(), 5)
    assert not reader.offered
    reader.inbox.put(decoded(2))
    assert taken(await reader.take()) == [2]


class _Stream:
    """A decode worker's, of one step."""

    def __init__(self, batch: worker_pb2.TokenBatch) -> None:
        self._batches = [batch]

    async def wait_for_connection(self) -> None:
        pass

    async def read(self) -> object:
        return self._batches.pop() if self._batches else grpc.aio.EOF


async def test_others_get_the_event_loop_while_a_large_step_is_sorted() -> None:
    count = 3 * MOST_IN_A_PASS
    subscription, readers, pacer = TokenSubscription(), list[Reader](), EmitPacer()
    for number in range(count):
        readers.append(Reader(pacer=pacer))
        subscription.register(str(number), 0, readers[-1])
    step = worker_pb2.TokenBatch()
    for number in range(count):
        step.requests.add(request_id=str(number), position=1, tokens=[common_pb2.Token(id=number)])
    await subscription.open(_Stream(step), timeout_s=5)
    pump, sorted_by_then = asyncio.create_task(subscription.pump()), list[int]()
    while not pump.done():
        await asyncio.sleep(0)
        sorted_by_then.append(sum(reader.inbox.decoding_since_ms is not None for reader in readers))
    with pytest.raises(Unavailable):
        await pump
    assert sorted_by_then[:4] == [MOST_IN_A_PASS, 2 * MOST_IN_A_PASS, count, count]


async def test_what_waits_for_a_slow_client_is_small_and_whole() -> None:
    count, top = 1000, 20
    reader = Reader(count + 1)
    reader.inbox.put(first())
    tracemalloc.start()
    try:
        for position in range(1, count + 1):
            entries = [common_pb2.TokenLogprob(token_id=position + rank, logprob=-rank / 3) for rank in range(top)]
            message = decoded(position, LAST if position == count else None)
            message.tokens[0].logprob = -position / 7
            message.tokens[0].top_logprobs.extend(entries)
            reader.inbox.put(message)
            del message, entries
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held / count < 600, "bytes a token; as objects they are over 2000"
    steps, parts = list[TokenStep](), 0
    while len(steps) <= count:
        part = await reader.take()
        assert 0 < len(part) <= MOST_AT_ONCE
        steps, parts = steps + part, parts + 1
    assert parts == -(-(count + 1) // MOST_AT_ONCE), "the event loop has other things to do between them"
    assert taken(steps) == list(range(count + 1))
    assert [step.finish_reason for step in steps[-2:]] == [None, FinishReason.LENGTH]
    one = steps[900].tokens[0]
    assert one.logprob == pytest.approx(-900 / 7)
    assert one.top_logprobs == tuple((900 + rank, pytest.approx(-rank / 3)) for rank in range(top))
