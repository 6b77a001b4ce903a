"""A KV transfer that fails is tried once more, by gRPC: one stream, the same tokens, nothing left behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from http_house import http_configuration, open_http_house
from manual_clock import ManualClock
from router_house import (
    DECODE,
    PREFILL,
    WIDER_THAN_A_WINDOW,
    House,
    collect,
    configuration,
    finish_of,
    ids_of,
    next_event,
    open_house,
)
from scripted_member import GRPC
from scripted_worker import ScriptedWorker

from router.pool.pace import PrefillPace
from tandem import errors
from tandem.types import Accepted, Completed, Delta, FinishReason
from tandem.v1 import registry_pb2

RAY = registry_pb2.Transport(name="ray", domain="cluster", node="node")
TWO_WAYS = (RAY, GRPC)
LOST = errors.TransferFailed("a payload in Ray's object store is lost")


@pytest.fixture
async def house() -> AsyncIterator[House]:
    async with open_house(configuration(transport="ray")) as opened:
        opened.cluster.output = [7, 8, 9, 10]
        yield opened
        await opened.check_empty()


def attempts(prefill: ScriptedWorker, decode: ScriptedWorker) -> list[tuple[int, str]]:
    """Attempt and transport of each Prefill call; Reserve says the same."""
    asked = [(each.request.attempt, each.target.transport) for each in prefill.prefill_requests]
    assert [(each.request.attempt, each.transport) for each in decode.reserve_requests] == asked
    return asked


@pytest.mark.parametrize("where", ["start", "first", "seal", "decode"])
async def test_the_second_attempt_answers(house: House, where: str) -> None:
    """decode: the receiving end is the one that says so."""
    prefill, decode = await house.pair(transports=TWO_WAYS)
    (decode if where == "decode" else prefill).faults[where] = LOST
    events = await collect(house.call(4))
    assert not prefill.faults
    assert not decode.faults, "the fault took effect"
    assert ids_of(events) == [7, 8, 9, 10]
    assert [type(event) for event in events].count(Accepted) == 1
    assert isinstance(events[-1], Completed)
    assert events[-1].usage.output_tokens == 4
    finish = finish_of(events)
    assert (finish.reason, finish.output_tokens, finish.report.transport) == (FinishReason.LENGTH, 4, "grpc")
    assert attempts(prefill, decode) == [(0, "ray"), (1, "grpc")]
    # A worker that said itself that the request is over is told nothing.
    assert len(house.cluster.happened("abort")) == (0 if where == "decode" else 1)
    marks = list(finish.report.timeline.marks.values())
    assert marks == sorted(marks)


async def test_metrics_count_attempts_that_were_followed_by_another() -> None:
    counted = 'tandem_retried_attempts_total{reason="transfer_failed",transport="ray"} 2.0'
    async with open_http_house(http_configuration(transport="ray")) as door:
        prefill, decode = await door.house.pair(transports=TWO_WAYS)
        for worker, where in ((prefill, "seal"), (decode, "decode")):
            worker.faults[where] = LOST
            await collect(door.house.call(4))
            assert not worker.faults, "the fault took effect"
        await collect(door.house.call(4))
        assert counted in (await door.client.get("/metrics")).text.splitlines()
        await door.house.check_empty()


async def test_the_first_token_is_given_once(house: House) -> None:
    prefill, _ = await house.pair(transports=TWO_WAYS)
    prefill.hold("seal")
    call = house.call(4)
    assert isinstance(await next_event(call), Accepted)
    first = await next_event(call)
    assert isinstance(first, Delta)
    assert [token.id for token in first.tokens] == [7]
    prefill.faults["seal"] = LOST
    prefill.let("seal")
    assert ids_of(await collect(call)) == [8, 9, 10]


async def test_a_client_with_its_first_token_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the second attempt's prompt would wait by what was measured."""
    clock = ManualClock()
    pace = PrefillPace(clock)
    monkeypatch.setattr("router.pool.books.PrefillPace", lambda: pace)
    async with open_house(configuration(transport="ray")) as house:
        prefill, decode = await house.pair(transports=TWO_WAYS)
        prefill.hold("seal")
        call = house.call(4)
        await house.cluster.saw("seal")
        assert [type(await next_event(call)) for _ in range(2)] == [Accepted, Delta]
        pace.sent("another", 3)
        clock.now_s += 1000
        with pytest.raises(errors.Overloaded):
            pace.check(6, remaining_s=20)
        prefill.faults["seal"] = LOST
        prefill.let("seal")
        assert len(ids_of(await collect(call))) == 3
        assert attempts(prefill, decode) == [(0, "ray"), (1, "grpc")]


@pytest.mark.parametrize("answers", [1, 2])
async def test_a_failure_while_the_client_does_not_read_loses_no_token(house: House, answers: int) -> None:
    """answers: the second one waits for its turn to write."""
    prefill, decode = await house.pair(transports=TWO_WAYS)
    house.cluster.top_logprobs = WIDER_THAN_A_WINDOW
    prefill.hold("seal")
    call = house.call(4, n=answers)
    await house.cluster.saw("seal", answers)
    prefill.errors["seal"] = LOST
    decode.hold("reserve")  # until the fault is gone
    prefill.let("seal")
    await house.cluster.saw("abort", answers)
    del prefill.errors["seal"]
    decode.let("reserve")
    events = await collect(call)
    assert [ids_of(events, choice) for choice in range(answers)] == [[7, 8, 9, 10]] * answers
    assert sorted(attempts(prefill, decode)) == [(0, "ray")] * answers + [(1, "grpc")] * answers


async def test_another_first_token_is_an_error(house: House) -> None:
    prefill, _ = await house.pair(transports=TWO_WAYS)
    prefill.hold("seal")
    call = house.call(4)
    await next_event(call)
    await next_event(call)
    house.cluster.output = [6, 8, 9, 10]
    prefill.faults["seal"] = LOST
    prefill.let("seal")
    with pytest.raises(errors.InternalError, match="the first token was 7, the second attempt says 6"):
        await collect(call)


async def test_two_failures_are_one_error(house: House) -> None:
    prefill, decode = await house.pair(transports=TWO_WAYS)
    prefill.errors["seal"] = LOST
    with pytest.raises(errors.TransferFailed, match="is lost"):
        await collect(house.call(4))
    assert attempts(prefill, decode) == [(0, "ray"), (1, "grpc")]
    assert len(house.cluster.happened("abort")) == 2
    assert (await house.status()).failed_requests == 1


async def test_any_other_failure_is_not_tried_again(house: House) -> None:
    prefill, decode = await house.pair(transports=TWO_WAYS)
    prefill.errors["seal"] = errors.Refused("prefill and decode workers do not fit")
    with pytest.raises(errors.Refused):
        await collect(house.call(4))
    assert attempts(prefill, decode) == [(0, "ray")]


@pytest.mark.parametrize("phase", ["reserve", "start", "first", "seal", "decode"])
async def test_a_cancel_in_the_second_attempt_releases_it(house: House, phase: str) -> None:
    prefill, decode = await house.pair(transports=TWO_WAYS)
    prefill.faults["seal"] = LOST
    prefill.hold("seal")
    call = house.call(50)
    await house.cluster.saw("seal")
    decode.hold("reserve")
    prefill.let("seal")
    await house.cluster.saw("reserve", 2)
    if phase != "reserve":
        (decode if phase == "decode" else prefill).hold(phase)
        decode.let("reserve")
        await house.cluster.saw(phase, 1 if phase == "decode" else 2)
    call.cancel()
    await asyncio.wait_for(house.cluster.saw("abort", 2), 1)
    await house.check_empty()
    assert (await house.status()).cancelled_requests == 1


async def test_the_deadline_holds_for_both_attempts_together(house: House) -> None:
    prefill, decode = await house.pair(transports=TWO_WAYS)
    prefill.faults["seal"] = LOST
    decode.hold("decode")
    with pytest.raises(errors.DeadlineExceeded):
        await collect(house.call(timeout=0.5))
    assert attempts(prefill, decode) == [(0, "ray"), (1, "grpc")]
    assert decode.reserve_requests[1].deadline_ms < decode.reserve_requests[0].deadline_ms
    await house.cluster.saw("abort", 2)


async def test_a_transport_that_is_ordered_and_not_shared_is_unavailable(house: House) -> None:
    await house.join("p1", PREFILL, transports=TWO_WAYS)
    await house.join("d1", DECODE, transports=(GRPC,))
    with pytest.raises(errors.Unavailable, match="do not share the KV transport ray; in common they have: grpc"):
        await collect(house.call(4))
