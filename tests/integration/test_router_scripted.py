"""The real router against scripted workers: real sockets and streams, no model."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from scripted_worker import FINGERPRINT, MODEL, Cluster, ScriptedWorker, eventually
from tokenizers import Tokenizer

from router.app import open_router
from tandem import errors, rpc, wire
from tandem.config import TINY_MODEL, TandemConfig, parse_config
from tandem.timeline import Phase
from tandem.types import Accepted, ChoiceFinished, Completed, Delta, Event, FinishReason, Role, SamplingParams
from tandem.v1 import generation_pb2, generation_pb2_grpc, registry_pb2

TOKENIZER = Tokenizer.from_file(str(TINY_MODEL / "tokenizer.json"))
ROOT = Path(__file__).parents[2]
# Log probabilities on a token, so that one event fills HTTP/2's window and the router's write waits for its reader.
WIDER_THAN_A_WINDOW = 15_000
PREFILL, DECODE = [Role.PREFILL], [Role.DECODE]


def configuration(**router: Any) -> TandemConfig:
    return parse_config({"router": {"port": 0, "heartbeat_timeout_s": 5.0, **router}})


@contextmanager
def listening(lines: list[str]) -> Iterator[None]:
    """Notes what the router says about workers that have become routable."""

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "is routable" in record.getMessage():
                lines.append(record.getMessage())

    logger, handler = logging.getLogger("router.worker"), Notes()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class House:
    """A router, its client and its workers."""

    def __init__(self, address: str, channel: grpc.aio.Channel, stack: AsyncExitStack) -> None:
        self.cluster = Cluster(address)
        self.stub: Any = generation_pb2_grpc.GenerationStub(channel)  # type: ignore[no-untyped-call]
        self._stack = stack
        self.routable_log: list[str] = []
        stack.enter_context(listening(self.routable_log))

    async def join(self, worker_id: str, roles: list[Role] | None = None, **changes: Any) -> ScriptedWorker:
        """Returns when requests can be placed on it."""
        worker = await self.start(worker_id, roles, **changes)
        await eventually(lambda: worker.directives)
        await self.routable(worker_id)
        return worker

    async def start(self, worker_id: str, roles: list[Role] | None = None, **changes: Any) -> ScriptedWorker:
        return await self._stack.enter_async_context(
            self.cluster.worker(worker_id, roles or [Role.PREFILL, Role.DECODE], **changes)
        )

    async def routable(self, worker_id: str) -> None:
        """The router's log says so; nothing else shows it before a request does."""
        await eventually(lambda: any(worker_id in line for line in self.routable_log))
        self.routable_log.clear()

    async def pair(self) -> tuple[ScriptedWorker, ScriptedWorker]:
        return await self.join("p1", PREFILL), await self.join("d1", DECODE)

    def call(self, max_tokens: int = 4, timeout: float | None = 20, **fields: Any) -> Any:
        sampling = fields.pop("sampling", None) or SamplingParams(max_tokens=max_tokens)
        fields.setdefault("token_ids", generation_pb2.TokenIds(ids=[1, 2, 3]))
        if "text" in fields:
            del fields["token_ids"]
        request = generation_pb2.GenerateRequest(sampling=wire.sampling_to_wire(sampling), **fields)
        return self.stub.Generate(request, timeout=timeout)

    async def status(self, check_integrity: bool = False) -> generation_pb2.StatusResponse:
        request = generation_pb2.StatusRequest(check_integrity=check_integrity)
        answer: generation_pb2.StatusResponse = await self.stub.Status(request)
        return answer

    async def check_empty(self) -> None:
        """Law 3, as far as scripted workers can tell."""
        await eventually(lambda: all(worker.held_requests == 0 for worker in self.cluster.workers.values()))
        assert (await self.status()).live_requests == 0


def narrow_channel(address: str) -> grpc.aio.Channel:
    """Without bandwidth probes, which would widen HTTP/2's window of 64 KiB until a slow reader's events fit in."""
    return grpc.aio.insecure_channel(address, options=[*rpc.client_options(), ("grpc.http2.bdp_probe", 0)])


@asynccontextmanager
async def open_house(config: TandemConfig) -> AsyncIterator[House]:
    async with (
        open_router(config) as address,
        narrow_channel(address) as channel,
        AsyncExitStack() as stack,
    ):
        yield House(address, channel, stack)


@pytest.fixture
async def house() -> AsyncIterator[House]:
    async with open_house(configuration()) as opened:
        yield opened


async def collect(call: Any) -> list[Event]:
    """Raises the TandemError that ended the call."""
    events: list[Event] = []
    try:
        while (message := await call.read()) is not grpc.aio.EOF:
            events.append(wire.event_from_wire(message))
    except grpc.aio.AioRpcError as error:
        raise rpc.error_from_rpc(error) from None
    return events


async def next_event(call: Any) -> Event:
    return wire.event_from_wire(await asyncio.wait_for(call.read(), 5))


def text_of(events: list[Event], choice: int = 0) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta) and event.choice == choice)


def ids_of(events: list[Event], choice: int = 0) -> list[int]:
    deltas = [event for event in events if isinstance(event, Delta) and event.choice == choice]
    return [token.id for delta in deltas for token in delta.tokens]


def finish_of(events: list[Event], choice: int = 0) -> ChoiceFinished:
    (finish,) = [event for event in events if isinstance(event, ChoiceFinished) and event.choice == choice]
    return finish


def spell(house: House, text: str) -> list[int]:
    house.cluster.output = TOKENIZER.encode(text, add_special_tokens=False).ids
    return house.cluster.output


# One request, from end to end.


async def test_split_happy_path(house: House) -> None:
    prefill, decode = await house.pair()
    house.cluster.output = [7, 8, 9, 10]
    events = await collect(house.call(4, user_tag="me", cache_salt="salt"))
    accepted, finish, completed = events[0], finish_of(events), events[-1]
    assert isinstance(accepted, Accepted)
    assert accepted.prompt_tokens == 3
    assert ids_of(events) == [7, 8, 9, 10]
    assert (finish.reason, finish.output_tokens, finish.stop) == (FinishReason.LENGTH, 4, None)
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
    failure = wire.failure_to_wire(errors.TransferFailed("torn"))
    decode.send(decode.reserve_requests[0].subscriber_id, request_id, 1, [], FinishReason.ERROR, failure)
    with pytest.raises(errors.TransferFailed, match="torn"):
        await collect(call)
    assert len(house.cluster.happened("abort")) == 2
    decode._decodes.pop(request_id).cancel()
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
    assert (await house.status()).failed_requests == 1


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
    prefill.errors[phase] = errors.TransferFailed("checksum of layer 3 is wrong")
    with pytest.raises(errors.TransferFailed, match="checksum of layer 3 is wrong"):
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
    await house.pair()

    def broken(*_: object) -> None:
        raise ValueError("secret detail")

    monkeypatch.setattr("router.output.ChoiceOutput.push", broken)
    with pytest.raises(errors.InternalError, match="internal error; the router's log has the details"):
        await collect(house.call())
    assert len(house.cluster.happened("abort")) == 1
    assert "secret detail" in caplog.text
    await house.check_empty()


# Workers that are lost.


@pytest.mark.parametrize("phase", ["start", "first", "seal"])
async def test_the_prefill_worker_dies(house: House, phase: str) -> None:
    prefill, _ = await house.pair()
    prefill.hold(phase)
    call = house.call()
    await house.cluster.saw(phase)
    await prefill.kill()
    with pytest.raises(errors.WorkerLost, match="prefill worker p1 was lost"):
        await asyncio.wait_for(collect(call), 3)
    assert len(house.cluster.happened("abort", "d1")) == 1
    await eventually(lambda: house.cluster.workers["d1"].held_requests == 0)
    with pytest.raises(errors.Unavailable, match="no prefill worker has joined"):
        await collect(house.call())


@pytest.mark.parametrize("phase", ["reserve", "start", "first", "seal", "decode"])
async def test_the_decode_worker_dies(house: House, phase: str) -> None:
    prefill, decode = await house.pair()
    (decode if phase in ("reserve", "decode") else prefill).hold(phase)
    call = house.call()
    await house.cluster.saw(phase)
    await decode.kill()
    with pytest.raises(errors.WorkerLost, match="decode worker d1 was lost"):
        await asyncio.wait_for(collect(call), 3)
    if phase in ("start", "first", "seal"):
        await house.cluster.saw("prefill_cancelled")


async def test_the_prefill_worker_is_not_needed_after_the_seal(house: House) -> None:
    prefill, decode = await house.pair()
    decode.hold("decode")
    call = house.call()
    await house.cluster.saw("prefill_done")
    await asyncio.wait_for(lost(house, prefill), 3)
    decode.let("decode")
    assert finish_of(await collect(call)).output_tokens == 4


async def lost(house: House, worker: ScriptedWorker) -> None:
    await worker.kill()
    while any(entry.hello.worker_id == worker.id for entry in (await house.status()).workers):
        await asyncio.sleep(0.01)


async def test_the_end_of_the_token_stream_alone_loses_the_worker(house: House) -> None:
    _, decode = await house.pair()
    decode.hold("decode")
    call = house.call()
    await house.cluster.saw("decode")
    decode.end_subscriptions()
    with pytest.raises(errors.WorkerLost, match="decode worker d1 was lost"):
        await asyncio.wait_for(collect(call), 3)
    await eventually(lambda: decode.join_error)


async def test_a_silent_worker_is_lost() -> None:
    async with open_house(configuration(heartbeat_timeout_s=0.5)) as house:
        prefill, decode = await house.pair()
        decode.hold("decode")
        call = house.call()
        await house.cluster.saw("decode")
        decode.silent = True
        with pytest.raises(errors.WorkerLost, match=r"decode worker d1 was lost: no heartbeat for 0\.5 s"):
            await asyncio.wait_for(collect(call), 3)
        await eventually(lambda: decode.join_error)
        assert "no heartbeat for 0.5 s" in str(decode.join_error)
        assert [entry.hello.worker_id for entry in (await house.status()).workers] == ["p1"]
        assert prefill.join_error is None


async def test_leaving_is_orderly(house: House) -> None:
    worker = await house.join("c1")
    await worker.leave()
    await asyncio.wait_for(worker.joining, 3)
    assert (await house.status()).workers == []


# Joining.


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"model": wire.model_from_wire(wire.model_to_wire(MODEL))},
            None,
        ),
        ({"version": "9.9"}, "tandem version '9.9' against the router's"),
        ({"total_blocks": 0}, "total_blocks is 0"),
        ({"address": "nowhere"}, "not host:port"),
    ],
)
async def test_who_may_join(house: House, changes: dict[str, Any], reason: str | None) -> None:
    await house.join("c1")
    if reason is None:
        await house.join("c2", **changes)
        return
    worker = await house.start("c2", **changes)
    await eventually(lambda: worker.join_error)
    assert isinstance(worker.join_error, errors.Refused)
    assert reason in str(worker.join_error)


async def test_a_refusal_names_the_difference_on_both_sides(house: House, caplog: pytest.LogCaptureFixture) -> None:
    await house.join("c1")
    other = replace(MODEL, fingerprint=replace(FINGERPRINT, block_size=32))
    with caplog.at_level(logging.WARNING):
        worker = await house.start("c2", model=other)
        await eventually(lambda: worker.join_error)
    assert isinstance(worker.join_error, errors.Refused)
    assert "block_size 32 against 16 of worker c1" in str(worker.join_error)
    assert "block_size 32 against 16 of worker c1" in caplog.text
    assert len((await house.status()).workers) == 1


async def test_an_empty_registry_takes_any_model(house: House) -> None:
    first = await house.join("c1")
    await first.leave()
    await asyncio.wait_for(first.joining, 3)
    await house.join("c2", model=replace(MODEL, name="other"))
    models = await house.stub.ListModels(generation_pb2.ListModelsRequest())
    assert [model.name for model in models.models] == ["other"]


async def test_a_worker_that_cannot_be_dialled_back_is_told_so() -> None:
    async with open_house(configuration(heartbeat_timeout_s=0.5)) as house:
        worker = await house.start("c1", address="127.0.0.1:1")
        await eventually(lambda: worker.join_error)
        assert "cannot reach worker c1 at 127.0.0.1:1" in str(worker.join_error)


async def test_a_newer_join_of_the_same_id_replaces_the_older(house: House) -> None:
    older = await house.join("c1")
    newer = await house.join("c1")
    await eventually(lambda: older.join_error)
    assert isinstance(older.join_error, errors.Refused), "it must not come back"
    assert "worker_id c1 joined again" in str(older.join_error)
    assert ids_of(await collect(house.call(2))) == [5, 5]
    assert newer.reserve_requests
    assert not older.reserve_requests


async def test_a_draining_worker_gets_no_new_work_and_finishes_what_it_has(house: House) -> None:
    first, second = await house.join("c1"), await house.join("c2")
    first.hold("decode")
    call = house.call()
    await house.cluster.saw("decode")
    first.draining = True
    await eventually_status(house, lambda status: status.workers[0].draining)
    for _ in range(3):
        await collect(house.call())
    assert (len(first.reserve_requests), len(second.reserve_requests)) == (1, 3)
    first.let("decode")
    assert finish_of(await collect(call)).report.decode_worker == "c1"


async def eventually_status(house: House, condition: Any) -> None:
    while not condition(await house.status()):
        await asyncio.sleep(0.01)


async def test_a_role_that_a_worker_takes_on_later_counts_from_its_hello(house: House) -> None:
    await house.join("p1", PREFILL)
    worker = await house.join("w1", PREFILL)
    with pytest.raises(errors.Unavailable, match="no decode worker"):
        await collect(house.call())
    worker.roles = frozenset(DECODE)
    await worker.beat(worker.hello())
    await eventually(lambda: worker.subscribed)
    report = finish_of(await collect(house.call())).report
    assert (report.prefill_worker, report.decode_worker) == ("p1", "w1")


# Leases, limits, requests that are wrong.


async def test_leases_are_renewed_until_the_seal_and_not_after() -> None:
    async with open_house(configuration(lease_s=0.3)) as house:
        prefill, decode = await house.pair()
        prefill.hold("seal")
        decode.hold("decode")
        call = house.call()
        await eventually(lambda: len(decode.renewed) >= 3)
        (reserve,) = decode.reserve_requests
        assert decode.renewed[0] == [f"reservation-{reserve.request.request_id}"]
        prefill.let("seal")
        await house.cluster.saw("prefill_done")
        await eventually_status(house, lambda status: status.requests)
        renewed = len(decode.renewed)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(never_again(decode, renewed + 1), 0.5)
        decode.let("decode")
        await collect(call)


async def never_again(decode: ScriptedWorker, count: int) -> None:
    await eventually(lambda: len(decode.renewed) > count)


async def test_one_more_request_than_the_house_holds() -> None:
    async with open_house(configuration(max_live_requests=1)) as house:
        prefill, _ = await house.pair()
        prefill.hold("start")
        call = house.call()
        await house.cluster.saw("start")
        with pytest.raises(errors.Overloaded) as caught:
            await collect(house.call())
        assert caught.value.retry_after_ms
        prefill.let("start")
        await collect(call)
        await collect(house.call())


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"text": b"ok \xf0\x28"}, errors.InvalidRequest, "not valid UTF-8 at byte 3"),
        ({"model": "huge"}, errors.ModelNotFound, "'huge' is not served; served: tiny"),
        ({"max_tokens": 5000}, errors.InvalidRequest, "limit of 512"),
        ({"stop": [""]}, errors.InvalidRequest, "must not be empty"),
    ],
)
async def test_wrong_requests(
    house: House, fields: dict[str, Any], error: type[errors.TandemError], message: str
) -> None:
    await house.join("c1")
    with pytest.raises(error, match=message) as caught:
        await collect(house.call(**fields))
    assert caught.value.field
    status = await house.status()
    assert (status.live_requests, status.finished_requests, status.failed_requests) == (0, 0, 0)


async def test_no_worker_at_all(house: House) -> None:
    with pytest.raises(errors.Unavailable, match="no worker has joined"):
        await collect(house.call())


async def test_a_pool_that_could_never_hold_it(house: House) -> None:
    await house.join("c1", total_blocks=2)
    with pytest.raises(errors.InvalidRequest, match="the largest decode worker holds 32"):
        await collect(house.call(100))


# A slow client, status, the end.


async def test_a_client_that_does_not_read_for_a_while_loses_nothing(house: House) -> None:
    _, decode = await house.pair()
    house.cluster.top_logprobs = WIDER_THAN_A_WINDOW
    house.cluster.output = list(range(10, 18))
    call = house.call(8)
    await house.cluster.saw("decode")
    await eventually(lambda: decode.held_requests == 0)
    assert (await house.status()).live_requests == 1, "the router waits for the client"
    assert ids_of(await collect(call)) == list(range(10, 18))


async def test_a_client_that_does_not_read_delays_no_release(house: House) -> None:
    prefill, decode = await house.pair()
    house.cluster.top_logprobs = WIDER_THAN_A_WINDOW
    prefill.hold("seal")
    call = house.call(8)
    await house.cluster.saw("seal")
    await decode.kill()
    await asyncio.wait_for(house.cluster.saw("prefill_cancelled"), 1)
    await asyncio.wait_for(eventually_status(house, lambda status: status.live_requests == 0), 1)
    with pytest.raises(errors.WorkerLost):
        await collect(call)


async def test_status_names_workers_and_live_requests(house: House) -> None:
    prefill, decode = await house.pair()
    decode.integrity = registry_pb2.Integrity(ok=False, problem="block 3 has no owner")
    prefill.hold("first")
    call = house.call()
    await house.cluster.saw("first")
    await eventually_status(house, lambda status: status.requests[0].phase == "prefill_started")
    status = await house.status(check_integrity=True)
    assert [worker.hello.worker_id for worker in status.workers] == ["p1", "d1"]
    assert [worker.integrity.ok for worker in status.workers] == [True, False]
    assert status.workers[1].integrity.problem == "block 3 has no owner"
    (live,) = status.requests
    assert (live.prefill_worker, live.decode_worker) == ("p1", "d1")
    assert [model.name for model in status.models] == ["tiny"]
    prefill.let("first")
    await collect(call)
    status = await house.status()
    assert (status.live_requests, status.finished_requests, status.failed_requests) == (0, 1, 0)
    assert not status.workers[0].HasField("integrity")


async def test_a_worker_that_cannot_check_itself_is_not_ok(house: House) -> None:
    await house.join("c1")
    stuck = await house.join("c2")
    stuck.errors["integrity"] = errors.InternalError("the engine is stuck")
    status = await house.status(check_integrity=True)
    assert {entry.hello.worker_id: entry.integrity.ok for entry in status.workers} == {"c1": True, "c2": False}
    assert "the engine is stuck" in status.workers[1].integrity.problem


async def test_a_stopping_router_lets_live_requests_finish_and_refuses_new_ones() -> None:
    async with AsyncExitStack() as outer:
        router = AsyncExitStack()
        house = await router.enter_async_context(open_house_around(outer, configuration()))
        prefill, _ = await house.pair()
        prefill.hold("first")
        call = house.call()
        await house.cluster.saw("first")
        stopping = asyncio.create_task(router.aclose())
        await refused(house)
        prefill.let("first")
        assert finish_of(await collect(call)).reason is FinishReason.LENGTH
        await asyncio.wait_for(stopping, 5)


async def refused(house: House) -> None:
    """Sends requests until one is refused; those that were taken wait at the held worker and are cancelled."""
    while True:
        call = house.call()
        try:
            await asyncio.wait_for(collect(call), 0.2)
        except TimeoutError:
            call.cancel()
        except errors.Unavailable as error:
            assert "the router is stopping" in str(error)  # noqa: PT017
            return


@asynccontextmanager
async def open_house_around(outer: AsyncExitStack, config: TandemConfig) -> AsyncIterator[House]:
    """The router closes first; client and workers stay until the outer stack ends."""
    async with open_router(config) as address:
        channel = await outer.enter_async_context(rpc.make_channel(address))
        yield House(address, channel, outer)


async def test_a_stopping_router_fails_what_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.app.STOP_GRACE_S", 0.1)
    async with AsyncExitStack() as outer:
        router = AsyncExitStack()
        house = await router.enter_async_context(open_house_around(outer, configuration()))
        prefill, _ = await house.pair()
        prefill.hold("first")
        call = house.call()
        await house.cluster.saw("first")
        await asyncio.wait_for(router.aclose(), 5)
        with pytest.raises(errors.Unavailable, match="the router stopped before the request had ended"):
            await collect(call)
        assert house.cluster.happened("abort")
        await eventually(lambda: prefill.join_error)
        assert isinstance(prefill.join_error, errors.Unavailable), "it may join the next router here"


# The process.


@asynccontextmanager
async def process(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "router", *arguments, stdout=pipe, stderr=pipe, cwd=ROOT
    )
    try:
        yield child
    finally:
        if child.returncode is None:
            child.kill()
        await child.communicate()


async def test_the_process_says_ready_serves_and_stops_on_a_signal(tmp_path: Path) -> None:
    config = tmp_path / "tandem.yaml"
    config.write_text("router: {port: 1}")
    async with process("--config", str(config), "--port", "0") as child:
        assert child.stdout is not None
        ready = (await asyncio.wait_for(child.stdout.readline(), 20)).decode()
        word, address = ready.split()
        assert word == "ready"
        assert address.startswith("127.0.0.1:")
        async with rpc.make_channel(address) as channel, AsyncExitStack() as stack:
            house = House(address, channel, stack)
            await house.start("c1")
            await eventually(lambda: house.cluster.workers["c1"].subscribed)
            assert finish_of(await collect(house.call())).output_tokens == 4
            health: Any = health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call]
            answer = await health.Check(health_pb2.HealthCheckRequest(service="tandem.v1.Generation"))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            child.terminate()
            output, log = await asyncio.wait_for(child.communicate(), 10)
        assert (child.returncode, output) == (0, b"")
        assert b"Traceback" not in log
        assert b"[-] worker c1 is routable" in log
        request_id = house.cluster.happened("reserve")[0]
        assert f"[{request_id}] placed on c1 and c1 by local".encode() in log


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("router: {port: %d}", "cannot listen on 127.0.0.1:%d: the port is in use"),
        ("router: {prot: %d}", "unknown config key router.prot; did you mean router.port?"),
    ],
)
async def test_a_wrong_configuration_ends_the_process_with_2(
    house: House, tmp_path: Path, text: str, message: str
) -> None:
    taken = int(house.cluster.router.rpartition(":")[2])
    config = tmp_path / "tandem.yaml"
    config.write_text(text % taken)
    async with process("--config", str(config)) as child:
        output, log = await asyncio.wait_for(child.communicate(), 20)
    assert (child.returncode, output) == (2, b"")
    assert (message % taken if "%" in message else message) in log.decode()
    assert "Traceback" not in log.decode()
