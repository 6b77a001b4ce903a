"""Scaling down under load: a worker that drains, or leaves, between a request's placement and its end fails nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from router_house import (
    DECODE,
    PREFILL,
    WIDER_THAN_A_WINDOW,
    House,
    collect,
    configuration,
    eventually_status,
    finish_of,
    ids_of,
    open_house,
)
from scripted_worker import ScriptedWorker, eventually

from tandem import errors, rpc
from tandem.types import FinishReason
from tandem.v1 import registry_pb2, registry_pb2_grpc


@pytest.fixture
async def house() -> AsyncIterator[House]:
    async with open_house(configuration()) as opened:
        yield opened


async def drain(house: House, worker: ScriptedWorker) -> None:
    """Returns when the router knows."""
    worker.draining = True
    await eventually_status(
        house, lambda status: any(w.draining for w in status.workers if w.hello.worker_id == worker.id)
    )


async def lose(house: House, worker: ScriptedWorker) -> None:
    await worker.kill()
    await eventually_status(house, lambda status: all(w.hello.worker_id != worker.id for w in status.workers))


def dismissed(worker: ScriptedWorker) -> bool:
    return any(directive.HasField("dismiss") for directive in worker.directives)


async def waiting_for_blocks(house: House) -> tuple[object, ScriptedWorker, ScriptedWorker]:
    """A request that the decode worker lets wait; the prefill worker that it was placed on, and another one."""
    workers = [await house.join(name, PREFILL) for name in ("p1", "p2")]
    decode = await house.join("d1", DECODE)
    decode.hold("reserve")
    call = house.call()
    await house.cluster.saw("reserve")
    (live,) = (await house.status()).requests
    workers.sort(key=lambda worker: worker.id != live.prefill_worker)
    return call, workers[0], workers[1]


async def test_a_prefill_worker_that_drains_meanwhile_is_left_for_another(house: House) -> None:
    call, chosen, other = await waiting_for_blocks(house)
    await drain(house, chosen)
    await eventually(lambda: dismissed(chosen))
    house.cluster.workers["d1"].let("reserve")
    assert finish_of(await collect(call)).report.prefill_worker == other.id
    assert not chosen.prefill_requests
    await house.check_empty()


async def test_a_prefill_worker_that_leaves_meanwhile_fails_nothing(house: House) -> None:
    call, chosen, other = await waiting_for_blocks(house)
    await lose(house, chosen)
    house.cluster.workers["d1"].let("reserve")
    assert finish_of(await collect(call)).report.prefill_worker == other.id
    await house.check_empty()


async def test_a_draining_prefill_worker_takes_what_was_placed_on_it_when_there_is_no_other(house: House) -> None:
    prefill, decode = await house.pair()
    decode.hold("reserve")
    call = house.call()
    await house.cluster.saw("reserve")
    await drain(house, prefill)
    decode.let("reserve")
    assert finish_of(await collect(call)).report.prefill_worker == "p1"
    with pytest.raises(errors.Unavailable, match="draining") as caught:
        await collect(house.call())
    assert caught.value.retry_after_ms == errors.RETRY_AFTER_MS


async def test_so_does_one_that_plays_another_role_by_then(house: House) -> None:
    _, decode = await house.pair()
    decode.hold("reserve")
    call = house.call()
    await house.cluster.saw("reserve")
    async with rpc.make_channel(house.cluster.router) as channel:
        admin: Any = registry_pb2_grpc.RouterAdminStub(channel)  # type: ignore[no-untyped-call]
        await admin.SetWorkerRoles(registry_pb2.SetWorkerRolesRequest(worker_id="p1", roles=[registry_pb2.ROLE_DECODE]))
    await eventually_status(house, lambda status: any(not worker.hello.roles for worker in status.workers))
    decode.let("reserve")
    assert finish_of(await collect(call)).report.prefill_worker == "p1"
    with pytest.raises(errors.Unavailable, match="no prefill worker"):
        await collect(house.call())


async def test_without_any_prefill_worker_left_the_request_fails_by_name(house: House) -> None:
    prefill, decode = await house.pair()
    decode.hold("reserve")
    call = house.call()
    await house.cluster.saw("reserve")
    await lose(house, prefill)
    decode.let("reserve")
    with pytest.raises(errors.Unavailable, match="no prefill worker is there: the last one was lost"):
        await collect(call)
    await house.check_empty()


@pytest.mark.parametrize("phase", ["start", "first", "seal"])
async def test_a_prefill_worker_is_dismissed_after_its_call_and_not_before(house: House, phase: str) -> None:
    prefill, decode = await house.pair()
    prefill.hold(phase)
    decode.hold("decode")
    call = house.call()
    await house.cluster.saw(phase)
    await drain(house, prefill)
    beats = prefill.beats
    await eventually(lambda: prefill.beats >= beats + 2)
    assert not dismissed(prefill)
    prefill.let(phase)
    await eventually(lambda: dismissed(prefill))
    await lose(house, prefill)
    decode.let("decode")
    assert finish_of(await collect(call)).output_tokens == 4


@pytest.mark.parametrize("phase", ["reserve", "decode"])
async def test_a_decode_worker_is_dismissed_after_its_last_token_and_not_before(house: House, phase: str) -> None:
    """A request that still waits for blocks was placed before it drained, so it gets them."""
    _, decode = await house.pair()
    decode.hold(phase)
    call = house.call()
    await house.cluster.saw(phase)
    await drain(house, decode)
    beats = decode.beats
    await eventually(lambda: decode.beats >= beats + 2)
    assert not dismissed(decode)
    decode.let(phase)
    assert finish_of(await collect(call)).output_tokens == 4
    await eventually(lambda: dismissed(decode))


async def test_a_decode_worker_that_told_its_last_token_may_be_lost(house: House) -> None:
    """The client has read nothing yet: it gets everything."""
    _, decode = await house.pair()
    house.cluster.top_logprobs = WIDER_THAN_A_WINDOW
    house.cluster.output = list(range(10, 18))
    call = house.call(8)
    await house.cluster.saw("decode")
    await drain(house, decode)
    await eventually(lambda: dismissed(decode))
    await lose(house, decode)
    assert (await house.status()).live_requests == 1
    assert ids_of(await collect(call)) == list(range(10, 18))


async def test_a_single_token_frees_the_decode_worker_however_slowly_it_is_read(house: House) -> None:
    _, decode = await house.pair()
    house.cluster.top_logprobs = WIDER_THAN_A_WINDOW
    call = house.call(1)
    await house.cluster.saw("abort")
    assert decode.held_requests == 0
    assert (await house.status()).live_requests == 1
    assert finish_of(await collect(call)).output_tokens == 1
    assert len(house.cluster.happened("abort")) == 1


async def test_a_decode_worker_is_not_needed_after_a_first_token_that_was_the_last(house: House) -> None:
    _, decode = await house.pair()
    house.cluster.top_logprobs = WIDER_THAN_A_WINDOW
    house.cluster.output, house.cluster.reason = [9], FinishReason.STOP
    call = house.call(8)
    await house.cluster.saw("prefill_done")
    await house.cluster.saw("abort")
    assert (await house.status()).live_requests == 1, "the router has read it, and waits for the client"
    await lose(house, decode)
    assert finish_of(await collect(call)).reason is FinishReason.STOP
