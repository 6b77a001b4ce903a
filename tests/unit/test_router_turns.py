from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Callable

import grpc
import pytest

from router.life.emit_pacer import BURST, INTERVAL_S, RATE, Turns
from router.life.output import Step
from router.pool.subscriptions import MOST_AT_ONCE, MOST_IN_A_PASS, Mailbox, Subscription
from tandem.errors import Unavailable
from tandem.types import FinishReason, Token
from tandem.v1 import common_pb2, worker_pb2


def noting(seen: list[int], number: int) -> Callable[[], None]:
    return lambda: seen.append(number)


async def test_a_turn_comes_at_once_while_there_are_few() -> None:
    turns, seen = Turns(), list[int]()
    for number in range(BURST):
        turns.ask(noting(seen, number))
    assert seen == list(range(BURST))


async def test_those_who_waited_get_one_turn_in_each_pass_of_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    turns, seen, last = Turns(), list[int](), asyncio.Event()
    loop, passes, now_s = asyncio.get_running_loop(), 0, 1e6
    monkeypatch.setattr(loop, "time", lambda: now_s)
    for number in range(BURST):
        turns.ask(noting(seen, number))
    assert len(seen) == BURST
    taken_in = list[int]()
    for _ in range(20):
        turns.ask(lambda: taken_in.append(passes))
    turns.ask(last.set)
    while not last.is_set():
        await asyncio.sleep(0)
        passes, now_s = passes + 1, now_s + 2 / RATE  # two turns become due in each
    assert len(taken_in) == len(set(taken_in)) == 20


async def test_many_wait_in_order_and_each_gets_one_turn() -> None:
    turns, seen, loop = Turns(), list[int](), asyncio.get_running_loop()
    started_s, everybody = loop.time(), asyncio.Event()
    for number in range(3 * BURST):
        turns.ask(noting(seen, number))
    turns.ask(everybody.set)
    await asyncio.wait_for(everybody.wait(), 5)
    assert seen == list(range(3 * BURST))
    assert loop.time() - started_s >= 2 * BURST / RATE - INTERVAL_S


async def test_new_ones_queue_behind_those_who_wait() -> None:
    turns, seen, last = Turns(), list[int](), asyncio.Event()
    for number in range(BURST + 2):
        turns.ask(noting(seen, number))
    await asyncio.sleep(0)
    turns.ask(noting(seen, -1))
    turns.ask(last.set)
    await asyncio.wait_for(last.wait(), 5)
    assert seen == [*range(BURST + 2), -1]


def decoded(position: int, reason: FinishReason | None = None) -> worker_pb2.RequestTokens:
    finish = common_pb2.FINISH_REASON_LENGTH if reason else common_pb2.FINISH_REASON_UNSPECIFIED
    return worker_pb2.RequestTokens(position=position, tokens=[common_pb2.Token(id=position)], finish_reason=finish)


def taken(steps: list[Step]) -> list[int]:
    return [token.id for step in steps for token in step.tokens]


async def test_steps_that_come_before_the_turn_are_taken_together() -> None:
    turns, spent = Turns(), list[int]()
    box = Mailbox(10, lambda: 0.0, turns, lambda: None)
    for number in range(BURST):
        turns.ask(noting(spent, number))
    box.put_first(Step((Token(0),)))
    assert taken(await box.take()) == [0]  # without a turn
    for position in range(1, 4):
        box.put_decoded(decoded(position, FinishReason.LENGTH if position == 3 else None))
    steps = await asyncio.wait_for(box.take(), 5)
    assert taken(steps) == [1, 2, 3]
    assert steps[-1].finish_reason is FinishReason.LENGTH


async def test_a_turn_without_anything_to_hand_over_wakes_nobody() -> None:
    """The first token took along what was decoded before it, although a turn was asked for."""
    turns, spent = Turns(), list[int]()
    box = Mailbox(10, lambda: 0.0, turns, lambda: None)
    box.put_first(Step((Token(0),)))
    for number in range(BURST):
        turns.ask(noting(spent, number))
    box.put_decoded(decoded(1))
    assert taken(await box.take()) == [0, 1]
    later = asyncio.Event()
    turns.ask(later.set)  # its turn comes after the mailbox's
    await asyncio.wait_for(later.wait(), 5)
    taking = asyncio.create_task(box.take())
    await asyncio.sleep(0)
    assert not taking.done()
    box.put_decoded(decoded(2))
    assert taken(await asyncio.wait_for(taking, 5)) == [2]


class _Stream:
    """A decode worker's, of one step."""

    def __init__(self, batch: worker_pb2.TokenBatch) -> None:
        self._batches = [batch]

    async def read(self) -> object:
        return self._batches.pop() if self._batches else grpc.aio.EOF


async def test_others_get_the_event_loop_while_a_large_step_is_sorted() -> None:
    count = 3 * MOST_IN_A_PASS
    subscription, boxes, turns = Subscription(), list[Mailbox](), Turns()
    for number in range(count):
        boxes.append(Mailbox(10, lambda: 0.0, turns, lambda: None))
        subscription.register(str(number), 0, boxes[-1])
    step = worker_pb2.TokenBatch()
    for number in range(count):
        step.requests.add(request_id=str(number), position=1, tokens=[common_pb2.Token(id=number)])
    subscription._call = _Stream(step)
    pump, sorted_by_then = asyncio.create_task(subscription.pump()), list[int]()
    while not pump.done():
        await asyncio.sleep(0)
        sorted_by_then.append(sum(box.decoding_since_ms is not None for box in boxes))
    with pytest.raises(Unavailable):
        await pump
    assert sorted_by_then[:4] == [MOST_IN_A_PASS, 2 * MOST_IN_A_PASS, count, count]


async def test_what_waits_for_a_slow_client_is_small_and_whole() -> None:
    count, top = 1000, 20
    box = Mailbox(count + 1, lambda: 0.0, Turns(), lambda: None)
    box.put_first(Step((Token(0),)))
    tracemalloc.start()
    try:
        for position in range(1, count + 1):
            entries = [common_pb2.TokenLogprob(token_id=position + rank, logprob=-rank / 3) for rank in range(top)]
            message = decoded(position, FinishReason.LENGTH if position == count else None)
            message.tokens[0].logprob = -position / 7
            message.tokens[0].top_logprobs.extend(entries)
            box.put_decoded(message)
            del message, entries
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held / count < 600, "bytes a token; as objects they are over 2000"
    steps, parts = list[Step](), 0
    while len(steps) <= count:
        part = await asyncio.wait_for(box.take(), 5)
        assert 0 < len(part) <= MOST_AT_ONCE
        steps, parts = steps + part, parts + 1
    assert parts == -(-(count + 1) // MOST_AT_ONCE), "the event loop has other things to do between them"
    assert taken(steps) == list(range(count + 1))
    assert [step.finish_reason for step in steps[-2:]] == [None, FinishReason.LENGTH]
    one = steps[900].tokens[0]
    assert one.logprob == pytest.approx(-900 / 7)
    assert one.top_logprobs == tuple((900 + rank, pytest.approx(-rank / 3)) for rank in range(top))
