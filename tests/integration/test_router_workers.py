"""Workers that join the real router, and workers that are lost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc
import pytest
from router_house import (
    DECODE,
    PREFILL,
    House,
    collect,
    configuration,
    eventually_status,
    finish_of,
    ids_of,
    open_house,
)
from scripted_member import FINGERPRINT, MODEL
from scripted_worker import ScriptedWorker, eventually

from router.life.inbox import Inbox, Stage
from tandem import errors, rpc, wire
from tandem.v1 import generation_pb2, registry_pb2, registry_pb2_grpc


@pytest.fixture
async def house() -> AsyncIterator[House]:
    async with open_house(configuration()) as opened:
        yield opened


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
    with pytest.raises(errors.Unavailable, match="no prefill worker is there: the last one was lost"):
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
    await eventually_status(house, lambda status: all(entry.hello.worker_id != worker.id for entry in status.workers))


@pytest.mark.parametrize("end", ["error", "death"])
async def test_the_prefill_worker_is_needed_until_its_first_token_has_come(
    house: House, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decode tokens may overtake it, on their own connection."""
    prefill, decode = await house.pair()
    states, put = list[Stage](), Inbox.put

    def noted(inbox: Inbox, arrival: Any) -> None:
        put(inbox, arrival)
        states.append(inbox.state)

    monkeypatch.setattr(Inbox, "put", noted)
    prefill.hold("first")
    call = house.call(3)
    await house.cluster.saw("first")
    (reserve,) = decode.reserve_requests
    decode.send(reserve.subscriber_id, reserve.request.request_id, 1, [9])
    await eventually(lambda: Stage.OVERTAKEN in states)
    if end == "error":
        prefill.errors["first"] = errors.TransferFailed("no such reservation")
        prefill.let("first")
    else:
        await prefill.kill()
    with pytest.raises(errors.TransferFailed if end == "error" else errors.WorkerLost):
        await asyncio.wait_for(collect(call), 5)
    await house.check_empty()


async def test_the_end_of_the_token_stream_alone_loses_the_worker(house: House) -> None:
    _, decode = await house.pair()
    decode.hold("decode")
    call = house.call()
    await house.cluster.saw("decode")
    decode.end_subscriptions()
    with pytest.raises(errors.WorkerLost, match=r"^decode worker d1 was lost: it ended its token stream$"):
        await asyncio.wait_for(collect(call), 3)
    await eventually(lambda: decode.join_error)


async def test_a_silent_worker_is_lost() -> None:
    async with open_house(configuration(heartbeat_interval_s=0.1, heartbeat_timeout_s=0.5)) as house:
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
        with pytest.raises(errors.Unavailable, match="no decode worker is there: the last one fell silent"):
            await collect(house.call())


async def test_leaving_is_orderly(house: House) -> None:
    worker = await house.join("c1")
    worker.draining = True
    await eventually(lambda: worker.beats >= 2)
    await worker.leave()
    await asyncio.wait_for(worker.joining, 3)
    assert (await house.status()).workers == []
    with pytest.raises(errors.Unavailable, match=r"no worker is there: the last one has left, so no model is served"):
        await collect(house.call())


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
        ({"address": "h" * 200}, "hello.address must have at most 128 characters, not 200"),
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


async def test_the_name_of_a_worker_has_a_limit(house: House) -> None:
    """A longer one would not even fit into the status that refuses it."""
    worker = await house.start("w" * 20_000)
    await eventually(lambda: worker.join_error)
    assert isinstance(worker.join_error, errors.Refused)
    assert "hello.worker_id must have at most 128 characters, not 20000" in str(worker.join_error)


async def test_an_empty_registry_takes_other_weights_of_its_model(house: House) -> None:
    first = await house.join("c1")
    await first.leave()
    await asyncio.wait_for(first.joining, 3)
    await house.join("c2", model=replace(MODEL, max_model_len=256))
    models = await house.stub.ListModels(generation_pb2.ListModelsRequest())
    assert [model.max_model_len for model in models.models] == [256]


async def test_a_worker_of_another_model_than_the_routers_is_refused(house: House) -> None:
    worker = await house.start("c1", model=replace(MODEL, name="other"))
    await eventually(lambda: worker.join_error)
    assert isinstance(worker.join_error, errors.Refused)
    assert "'other', the router 'tiny'" in str(worker.join_error)


async def test_a_worker_that_cannot_be_dialled_back_is_told_so() -> None:
    async with open_house(configuration(heartbeat_interval_s=0.1, heartbeat_timeout_s=0.5)) as house:
        worker = await house.start("c1", address="127.0.0.1:1")
        await eventually(lambda: worker.beats >= 3)
        worker.silent = True
        await eventually(lambda: worker.join_error)
        assert "cannot reach worker c1 at 127.0.0.1:1" in str(worker.join_error)


async def test_a_join_with_a_live_workers_id_is_refused(house: House) -> None:
    """The id, and all else that Status tells of a worker, is no proof of being it."""
    worker = await house.join("c1")
    worker.hold("decode")
    call = house.call()
    await house.cluster.saw("decode")
    [told] = (await house.status()).workers
    assert not told.hello.instance
    for hello in (told.hello, worker.hello()):
        if hello.instance:
            hello.instance = "0" * 32
        async with joining(house, hello) as join:
            with pytest.raises(grpc.aio.AioRpcError, match="a live worker has this worker_id") as caught:
                await rpc.read(join)
        assert isinstance(rpc.error_from_rpc(caught.value), errors.Refused)
    worker.let("decode")
    assert len(ids_of(await collect(call))) == 4, "its link and its requests live on"
    assert ids_of(await collect(house.call(2))) == [5, 5]
    assert worker.join_error is None


async def test_a_worker_whose_link_broke_unnoticed_joins_in_place_of_itself(house: House) -> None:
    worker = await house.join("c1")
    worker.silent = True
    async with joining(house, worker.hello()) as join:
        assert (await rpc.read(join)).HasField("welcome"), "though the former stream still stands"
        await eventually(lambda: worker.join_error)
        assert isinstance(worker.join_error, errors.Unavailable)
        await house.routable("c1")
        assert ids_of(await collect(house.call(2))) == [5, 5]


@asynccontextmanager
async def joining(house: House, hello: registry_pb2.Hello) -> AsyncIterator[Any]:
    async with rpc.make_channel(house.cluster.router) as channel:
        stub: Any = registry_pb2_grpc.RegistryStub(channel)  # type: ignore[no-untyped-call]
        join = stub.Join()
        await join.write(registry_pb2.Heartbeat(hello=hello, number=1))
        yield join


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
