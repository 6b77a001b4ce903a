"""The real router against scripted workers: one request, and every way out of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from router_house import (
    TOKENIZER,
    House,
    collect,
    configuration,
    eventually_status,
    finish_of,
    ids_of,
    next_event,
    open_house,
    spell,
    text_of,
)
from scripted_member import FINGERPRINT
from scripted_worker import COMPUTE_MS

from tandem import errors, wire
from tandem.timeline import Phase
from tandem.types import Accepted, Completed, Delta, Event, FinishReason, SamplingParams


@pytest.fixture
async def house() -> AsyncIterator[House]:
    async with open_house(configuration()) as opened:
        yield opened


def endings_of(events: list[Event]) -> list[tuple[FinishReason, str | None]]:
    """What the last Delta says, which has tokens too."""
    deltas = [event for event in events if isinstance(event, Delta)]
    assert all(delta.tokens for delta in deltas)
    assert [delta.reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    return [(delta.reason, delta.stop) for delta in deltas if delta.reason is not None]


async def test_split_happy_path(house: House) -> None:
    prefill, decode = await house.pair()
    house.cluster.output = [7, 8, 9, 10]
    events = await collect(house.call(4, user_tag="me", cache_salt="salt"))
    accepted, finish, completed = events[0], finish_of(events), events[-1]
    assert isinstance(accepted, Accepted)
    assert accepted.prompt_tokens == 3
    assert ids_of(events) == [7, 8, 9, 10]
    assert (finish.reason, finish.output_tokens, finish.stop) == (FinishReason.LENGTH, 4, None)
    assert endings_of(events) == [(FinishReason.LENGTH, None)]
    assert isinstance(completed, Completed)
    assert (completed.usage.prompt_tokens, completed.usage.output_tokens) == (3, 4)
    assert completed.usage.cached_prompt_tokens == 2
    order = [what for _, what, _ in house.cluster.log]
    assert order[:5] == ["reserve", "start", "first", "seal", "decode"]
    assert "abort" not in order
    (reserve,), (request,) = decode.reserve_requests, prefill.prefill_requests
    assert reserve.request == request.request
    assert reserve.request.request_id == accepted.request_id
    assert reserve.request.cache_salt == "salt"
    assert reserve.lease_ms == 10_000
    assert reserve.transport == "grpc"
    assert 15_000 < reserve.deadline_ms < 21_000, "what is left of the call's 20 s, which gRPC rounds up"
    target = request.target
    assert (target.worker_id, target.address, target.transport) == ("d1", decode.address, "grpc")
    assert (target.reservation_id, target.cached_tokens) == (f"reservation-{accepted.request_id}", 1)
    assert request.fingerprint == wire.fingerprint_to_wire(FINGERPRINT)
    await house.check_empty()


async def test_the_report_of_a_split_request(house: House) -> None:
    await house.pair()
    report = finish_of(await collect(house.call(4))).report
    assert (report.kv_bytes, report.kv_frames, report.kv_reused_tokens) == (1000, 3, 1)
    assert (report.prefill_worker, report.decode_worker, report.transport) == ("p1", "d1", "grpc")
    marks = report.timeline.marks
    assert set(marks) == set(Phase)
    assert [marks[phase] for phase in Phase] == sorted(marks.values())


async def test_prefill_took_as_long_as_its_worker_says(house: House) -> None:
    """However late the router hears of its start, or of its end."""
    prefill, _ = await house.pair()
    prefill.hold("first")
    call = house.call(2)
    assert isinstance(await next_event(call), Accepted)
    await eventually_status(house, lambda status: [each.phase for each in status.requests] == ["prefill_started"])
    prefill.let("first")
    timeline = finish_of(await collect(call)).report.timeline
    assert timeline.between_ms(Phase.PREFILL_STARTED, Phase.FIRST_TOKEN) == pytest.approx(COMPUTE_MS)


async def test_colocated_hands_off_locally(house: House) -> None:
    worker = await house.join("c1")
    events = await collect(house.call(3))
    assert ids_of(events) == [5, 5, 5]
    assert worker.prefill_requests[0].target.transport == "local"
    assert worker.prefill_requests[0].target.worker_id == "c1"
    await house.check_empty()


async def test_the_first_token_does_not_wait_for_the_seal(house: House) -> None:
    prefill, _ = await house.pair()
    prefill.hold("seal")
    call = house.call(2)
    assert isinstance(await next_event(call), Accepted)
    first = await next_event(call)
    assert isinstance(first, Delta)
    assert len(first.tokens) == 1
    prefill.let("seal")
    assert finish_of(await collect(call)).reason is FinishReason.LENGTH


async def test_a_request_that_ends_with_its_first_token_frees_the_reservation(house: House) -> None:
    await house.pair()
    events = await collect(house.call(1))
    assert finish_of(events).output_tokens == 1
    assert len(house.cluster.happened("abort", "d1")) == 1
    assert Phase.DECODE_STARTED not in finish_of(events).report.timeline.marks
    await house.check_empty()


async def test_text_in_text_out(house: House) -> None:
    await house.pair()
    ids = spell(house, " there was a little girl — ñ😀!")
    events = await collect(house.call(len(ids), text=b"Once upon a time"))
    assert text_of(events) == " there was a little girl — ñ😀!"
    assert ids_of(events) == ids


async def test_several_tokens_a_step(house: House) -> None:
    _, decode = await house.pair()
    decode.steps_per_batch = 3
    house.cluster.output = list(range(10, 20))
    assert ids_of(await collect(house.call(10))) == list(range(10, 20))


async def test_a_stop_string_ends_the_choice_and_frees_the_worker(house: House) -> None:
    await house.pair()
    ids = spell(house, "one two three STOP four five")
    events = await collect(house.call(len(ids) + 50, text=b"count", stop=["nope", " STOP"]))
    finish = finish_of(events)
    assert text_of(events) == "one two three"
    assert (finish.reason, finish.stop) == (FinishReason.STOP, " STOP")
    assert endings_of(events) == [(FinishReason.STOP, " STOP")]
    assert finish.output_tokens == len(ids_of(events)) < len(ids)
    await house.check_empty()


async def test_a_stop_string_in_the_first_token_cancels_the_transfer(house: House) -> None:
    prefill, _ = await house.pair()
    prefill.hold("seal")
    (first, *_) = spell(house, "a b")
    text = TOKENIZER.decode([first])
    finish = finish_of(await collect(house.call(9, stop=[text])))
    assert (finish.reason, finish.output_tokens) == (FinishReason.STOP, 1)
    await house.cluster.saw("prefill_cancelled")
    await house.check_empty()


async def test_the_end_of_sequence(house: House) -> None:
    await house.pair()
    ids = spell(house, "the end")
    house.cluster.output, house.cluster.reason = [*ids, 0], FinishReason.STOP
    events = await collect(house.call(100))
    assert text_of(events) == "the end"
    assert ids_of(events) == [*ids, 0]
    assert finish_of(events).reason is FinishReason.STOP
    assert house.cluster.happened("abort") == []


async def test_three_choices_at_once(house: House) -> None:
    _, decode = await house.pair()
    decode.hold("decode")
    call = house.call(n=3, sampling=SamplingParams(max_tokens=5, seed=9, temperature=1.0))
    await house.cluster.saw("decode", 3)
    decode.let("decode")
    events = await collect(call)
    for choice in range(3):
        assert finish_of(events, choice).output_tokens == len(ids_of(events, choice)) == 5
    assert isinstance(events[-1], Completed)
    assert events[-1].usage.output_tokens == 15
    requests = {request.request.request_id: request.request.sampling.seed for request in decode.reserve_requests}
    assert len(requests) == len(set(requests.values())) == 3
    assert 9 in requests.values()
    await house.check_empty()


async def test_a_failing_choice_ends_its_siblings(house: House) -> None:
    _, decode = await house.pair()
    decode.hold("decode")
    call = house.call(n=3)
    await house.cluster.saw("decode", 3)
    request_id = decode.reserve_requests[0].request.request_id
    failure = wire.failure_to_wire(errors.Unavailable("torn"))
    decode.send(decode.reserve_requests[0].subscriber_id, request_id, 1, [], FinishReason.ERROR, failure)
    with pytest.raises(errors.Unavailable, match="torn"):
        await collect(call)
    assert len(house.cluster.happened("abort")) == 2
    decode.drop_decode(request_id)
    await house.check_empty()


# Every way out releases both workers.


@pytest.mark.parametrize("phase", ["reserve", "start", "first", "seal", "decode"])
async def test_cancel_in_every_phase_releases_both(house: House, phase: str) -> None:
    prefill, decode = await house.pair()
    (decode if phase in ("reserve", "decode") else prefill).hold(phase)
    call = house.call(50)
    await house.cluster.saw(phase)
    call.cancel()
    await asyncio.wait_for(house.cluster.saw("abort"), 1)
    if phase in ("start", "first", "seal"):
        await asyncio.wait_for(house.cluster.saw("prefill_cancelled"), 1)
    if phase == "reserve":
        await asyncio.wait_for(house.cluster.saw("reserve_cancelled"), 1)
    await house.check_empty()
    assert (await house.status()).cancelled_requests == 1


@pytest.mark.parametrize("phase", ["reserve", "start", "first", "seal", "decode"])
async def test_the_deadline_in_every_phase_releases_both(phase: str) -> None:
    async with open_house(configuration(default_deadline_s=0.4)) as house:
        prefill, decode = await house.pair()
        (decode if phase in ("reserve", "decode") else prefill).hold(phase)
        with pytest.raises(errors.DeadlineExceeded, match="deadline"):
            await collect(house.call(50, timeout=None))
        await house.cluster.saw("abort")
        await house.check_empty()


async def test_the_clients_deadline_counts_if_it_is_shorter(house: House) -> None:
    prefill, _ = await house.pair()
    prefill.hold("start")
    with pytest.raises(errors.DeadlineExceeded):
        await collect(house.call(timeout=0.3))
    await house.cluster.saw("abort")
    await house.check_empty()


@pytest.mark.parametrize("phase", ["start", "first", "seal"])
async def test_prefill_fails(house: House, phase: str) -> None:
    prefill, _ = await house.pair()
    prefill.errors[phase] = errors.InternalError("a step failed")
    with pytest.raises(errors.InternalError, match="a step failed"):
        await collect(house.call())
    assert len(house.cluster.happened("abort")) == 1
    await house.check_empty()
    del prefill.errors[phase]
    assert finish_of(await collect(house.call())).reason is FinishReason.LENGTH


async def test_reserve_is_refused(house: House) -> None:
    _, decode = await house.pair()
    decode.errors["reserve"] = errors.Overloaded("too many wait", retry_after_ms=70)
    with pytest.raises(errors.Overloaded, match="too many wait") as caught:
        await collect(house.call())
    assert caught.value.retry_after_ms == 70
    assert house.cluster.happened("start") == []
    await house.check_empty()


async def test_decode_reports_a_failure(house: House) -> None:
    _, decode = await house.pair()
    decode.errors["decode"] = errors.InternalError("no such block")
    with pytest.raises(errors.InternalError, match="no such block"):
        await collect(house.call())
    assert house.cluster.happened("abort") == [], "decode ended it itself"
    await house.check_empty()


async def test_a_gap_in_positions_is_an_error_and_stale_tokens_are_nothing(house: House) -> None:
    _, decode = await house.pair()
    decode.hold("decode")
    call = house.call(8)
    await house.cluster.saw("decode")
    (reserve,) = decode.reserve_requests
    decode.send(reserve.subscriber_id, reserve.request.request_id, 1, [99], attempt=7)
    decode.send(reserve.subscriber_id, "nobody", 1, [99])
    decode.send(reserve.subscriber_id, reserve.request.request_id, 2, [99])
    with pytest.raises(errors.InternalError, match="position 2 where 1 was due"):
        await collect(call)
    await house.check_empty()


async def test_more_tokens_than_asked_for_are_an_error(house: House) -> None:
    _, decode = await house.pair()
    decode.hold("decode")
    call = house.call(3)
    await house.cluster.saw("decode")
    (reserve,) = decode.reserve_requests
    decode.send(reserve.subscriber_id, reserve.request.request_id, 1, [9, 9, 9])
    with pytest.raises(errors.InternalError, match="more than max_tokens=3"):
        await collect(call)
    await house.check_empty()


async def test_a_bug_releases_both_and_keeps_its_details_in_the_log(
    house: House, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _, decode = await house.pair()
    decode.hold("decode")  # or it may report its end before the bug strikes, and needs no abort

    def broken(*_: object) -> None:
        raise ValueError("secret detail")

    monkeypatch.setattr("router.life.output.ChoiceOutput.push", broken)
    with pytest.raises(errors.InternalError, match="internal error; the router's log has the details"):
        await collect(house.call())
    assert len(house.cluster.happened("abort")) == 1
    assert "secret detail" in caplog.text
    await house.check_empty()
