"""What bounds the real router, and what it says of itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from router_house import (
    WIDER_THAN_A_WINDOW,
    House,
    collect,
    configuration,
    eventually_status,
    ids_of,
    open_house,
)
from scripted_worker import eventually

from router.app import LEAST_UNTAKEN
from tandem import AsyncClient, errors
from tandem.timeline import Phase
from tandem.v1 import registry_pb2


@pytest.fixture
async def house() -> AsyncIterator[House]:
    async with open_house(configuration()) as opened:
        yield opened


async def test_leases_are_renewed_until_the_end_and_not_after() -> None:
    async with open_house(configuration(lease_s=0.3)) as house:
        prefill, decode = await house.pair()
        prefill.hold("seal")
        decode.hold("decode")
        call = house.call()
        await eventually(lambda: len(decode.renewed) >= 3)
        (reserve,) = decode.reserve_requests
        assert decode.renewed[0] == [f"reservation-{reserve.request.request_id}"]
        prefill.let("seal")
        await house.cluster.saw("decode")
        renewed = len(decode.renewed)
        await eventually(lambda: len(decode.renewed) >= renewed + 2)
        decode.let("decode")
        await collect(call)
        # A renewal may be on its way; of a lease of 0.3 s three would come in this time.
        renewed = len(decode.renewed) + 1
        await asyncio.sleep(0.35)
        assert len(decode.renewed) <= renewed


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


async def test_what_grpc_itself_turns_away_is_overload() -> None:
    """More calls at once than may wait for the router: its gRPC cancels some, before any code of ours hears of them."""
    async with open_house(configuration(max_live_requests=1)) as house:
        await house.join("c1")
        async with AsyncClient(house.cluster.router) as client:
            asked = [client.complete([1, 2, 3], max_tokens=2, timeout_s=30) for _ in range(2 * LEAST_UNTAKEN)]
            answers = await asyncio.gather(*asked, return_exceptions=True)
    failed = [answer for answer in answers if isinstance(answer, BaseException)]
    assert any("turned this one away" in str(error) for error in failed), "the fault was there"
    assert {(type(error), getattr(error, "retry_after_ms", None)) for error in failed} == {(errors.Overloaded, 1000)}
    assert len(failed) < len(answers)


async def test_each_answer_counts() -> None:
    async with open_house(configuration(max_live_requests=3)) as house:
        prefill, _ = await house.pair()
        prefill.hold("start")
        call = house.call(n=2)
        await house.cluster.saw("start", 2)
        with pytest.raises(errors.Overloaded, match=r"takes is 3 \(router.max_live_requests\)") as caught:
            await collect(house.call(n=2))
        assert caught.value.retry_after_ms
        with pytest.raises(errors.InvalidRequest, match="n asks for 4 answers at once") as never:
            await collect(house.call(n=4))
        assert never.value.field == "n"
        prefill.let("start")
        await collect(house.call())
        await collect(call)
        await house.check_empty()


async def test_thousands_of_answers_at_once() -> None:
    """gRPC's own limit is 1000 calls that nobody has taken yet; from there on it cancels some, aborts among them."""
    async with open_house(configuration(max_live_requests=4096)) as house:
        await house.pair()
        calls = [house.call(2, timeout=60, n=32) for _ in range(128)]
        assert [len(ids_of(events, 31)) for events in await asyncio.gather(*map(collect, calls))] == [2] * 128
        await house.check_empty()


async def test_a_call_that_grpc_breaks_off_is_no_loss_of_its_worker(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill, _ = await house.pair()
    with monkeypatch.context() as patch:
        # As gRPC itself would: with a status, and nothing of Tandem's.
        patch.setattr(prefill, "run_prefill", lambda _, __, context: context.abort(grpc.StatusCode.CANCELLED))
        await _broken_off(house)
    await collect(house.call())
    await house.check_empty()


async def _broken_off(house: House) -> None:
    with pytest.raises(errors.Unavailable, match="the prefill worker broke off the call") as caught:
        await collect(house.call())
    assert not isinstance(caught.value, errors.WorkerLost)


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


# A slow client, status.


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


async def test_a_client_that_never_reads_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its place goes to others while it is still connected; when it reads on, it hears why its answer ended."""
    monkeypatch.setattr("router.doors.grpc.generation.STALL_S", 0.5)
    async with open_house(configuration(max_live_requests=2)) as house:
        await house.pair()
        house.cluster.top_logprobs = WIDER_THAN_A_WINDOW
        calls = [house.call(8, timeout=None) for _ in range(2)]
        await house.cluster.saw("first", 2)
        with pytest.raises(errors.Overloaded):
            await collect(house.call())
        await house.check_empty()
        house.cluster.top_logprobs = 0
        assert len(ids_of(await collect(house.call(timeout=5)))) == 4, "on the same connection"
        assert (await house.status()).cancelled_requests == 2
        for call in calls:
            assert not call.done()
            with pytest.raises(errors.Cancelled, match=r"taken nothing for 0.5 s"):
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


async def test_status_tells_how_far_a_request_has_come(house: House) -> None:
    prefill, decode = await house.pair()
    prefill.hold("seal")
    decode.hold("decode")
    decode.hold("rest")
    call = house.call(8)

    async def reaches(phase: Phase) -> None:
        await eventually_status(house, lambda status: [each.phase for each in status.requests] == [phase])

    await reaches(Phase.FIRST_TOKEN)
    prefill.let("seal")
    await reaches(Phase.KV_SEALED)
    decode.let("decode")
    await reaches(Phase.DECODE_STARTED)
    decode.let("rest")
    await collect(call)


async def test_a_worker_that_cannot_check_itself_is_not_ok(house: House) -> None:
    await house.join("c1")
    stuck = await house.join("c2")
    stuck.errors["integrity"] = errors.InternalError("the engine is stuck")
    status = await house.status(check_integrity=True)
    assert {entry.hello.worker_id: entry.integrity.ok for entry in status.workers} == {"c1": True, "c2": False}
    assert "the engine is stuck" in status.workers[1].integrity.problem
