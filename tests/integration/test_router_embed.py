"""Embed on the real router, with scripted workers: placement, order, and every way that it can end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from itertools import accumulate
from typing import Any

import grpc
import pytest
from router_house import DECODE, PREFILL, House, configuration, eventually_status, open_house, open_house_around
from scripted_member import MODEL
from scripted_worker import eventually

from router.life.embedding import MAX_AT_ONCE
from tandem import rpc
from tandem.client.embedding import Embeddings, embeddings_from_wire
from tandem.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    TandemError,
    Unavailable,
    WorkerLost,
)
from tandem.types import MAX_EMBED_INPUTS
from tandem.v1 import common_pb2, generation_pb2


@pytest.fixture
async def house() -> AsyncIterator[House]:
    async with open_house(configuration(max_live_requests=2)) as house:
        yield house
        await house.check_empty()


def call(house: House, *prompts: list[int], timeout: float = 10, **fields: Any) -> Any:
    inputs = [generation_pb2.EmbedInput(token_ids=generation_pb2.TokenIds(ids=prompt)) for prompt in prompts]
    fields.setdefault("inputs", inputs)
    return house.stub.Embed(generation_pb2.EmbedRequest(**fields), timeout=timeout)


async def answer(call: Any) -> Embeddings:
    """Raises the TandemError that ended the call."""
    try:
        return embeddings_from_wire(await call)
    except grpc.aio.AioRpcError as error:
        raise rpc.error_from_rpc(error) from None


async def test_vectors_come_in_the_order_of_the_inputs(house: House) -> None:
    worker = await house.join("p1", PREFILL)
    got = await answer(call(house, [7, 1], [9], [8, 1, 1], user_tag="t", cache_salt="tenant"))
    assert got.vectors == ((7, 2), (9, 1), (8, 3))
    assert (got.usage.prompt_tokens, got.usage.output_tokens, got.usage.cached_prompt_tokens) == (6, 0, 3)
    for request in worker.embed_requests:
        assert (request.pooling, request.normalize, request.cache_salt) == (common_pb2.POOLING_LAST, True, "tenant")
    status = await house.status()
    assert (status.finished_requests, status.live_requests) == (1, 0)


async def test_options_reach_the_worker(house: House) -> None:
    worker = await house.join("p1", PREFILL)
    await answer(call(house, [7], pooling=common_pb2.POOLING_MEAN, normalize=False))
    (request,) = worker.embed_requests
    assert (request.pooling, request.normalize) == (common_pb2.POOLING_MEAN, False)


async def test_inputs_spread_over_the_prefill_workers_a_few_at_a_time(house: House) -> None:
    workers = [await house.join(name, PREFILL) for name in ("p1", "p2")]
    await house.join("d1", DECODE)
    for worker in workers:
        worker.hold("embed")
    asked = asyncio.ensure_future(answer(call(house, *[[number] * 5 for number in range(1, 41)])))
    await house.cluster.saw("embed", MAX_AT_ONCE)
    assert [len(worker.embed_requests) for worker in workers] == [MAX_AT_ONCE // 2] * 2
    for worker in workers:
        worker.let("embed")
    assert [vector[0] for vector in (await asked).vectors] == list(range(1, 41))
    steps = {"embed": 1, "embed_done": -1}
    assert max(accumulate(steps.get(what, 0) for _, what, _ in house.cluster.log)) == MAX_AT_ONCE
    assert min(len(worker.embed_requests) for worker in workers) > 5
    assert house.cluster.workers["d1"].embed_requests == []


async def test_one_failure_ends_the_call_and_cancels_the_rest(house: House) -> None:
    bad, good = await house.join("p1", PREFILL), await house.join("p2", PREFILL)
    bad.errors["embed"] = InternalError("the engine failed")
    for worker in (bad, good):
        worker.hold("embed")
    asked = asyncio.ensure_future(answer(call(house, [1] * 9, [2] * 9)))
    await house.cluster.saw("embed", 2)
    bad.let("embed")
    with pytest.raises(InternalError, match="the engine failed"):
        await asked
    await house.cluster.saw("embed_cancelled")
    assert (await house.status()).failed_requests == 1


async def test_cancel_and_deadline_reach_the_worker(house: House) -> None:
    worker = await house.join("p1", PREFILL)
    worker.hold("embed")
    asked = call(house, [1])
    await house.cluster.saw("embed")
    assert (await house.status()).live_requests == 1
    asked.cancel()
    await house.cluster.saw("embed_cancelled")
    with pytest.raises(DeadlineExceeded):
        await answer(call(house, [1], timeout=0.2))
    await house.cluster.saw("embed_cancelled", 2)
    await eventually_status(house, lambda status: status.cancelled_requests == 2)


async def test_the_loss_of_its_worker_ends_it_at_once(house: House) -> None:
    worker = await house.join("p1", PREFILL)
    worker.hold("embed")
    asked = asyncio.ensure_future(answer(call(house, [1])))
    await house.cluster.saw("embed")
    await worker.leave()
    with pytest.raises(WorkerLost, match="prefill worker p1 was lost"):
        await asyncio.wait_for(asked, 1)
    worker.let("embed")


async def test_a_full_house_refuses_it(house: House) -> None:
    worker = await house.join("p1", PREFILL)
    worker.hold("embed")
    two = [asyncio.ensure_future(answer(call(house, [1]))) for _ in range(2)]
    await house.cluster.saw("embed", 2)
    with pytest.raises(Overloaded, match="2 answers are under way, and 1 more"):
        await answer(call(house, [1]))
    worker.let("embed")
    await asyncio.gather(*two)


async def test_without_a_prefill_worker_it_is_unavailable(house: House) -> None:
    with pytest.raises(Unavailable, match="no worker has joined"):
        await answer(call(house, [1]))
    await house.join("d1", DECODE)
    with pytest.raises(Unavailable, match="no prefill worker has joined"):
        await answer(call(house, [1]))


NO_PROMPT = [generation_pb2.EmbedInput()]
NOT_UTF8 = [generation_pb2.EmbedInput(text=b"ab"), generation_pb2.EmbedInput(text=b"a\xff")]


@pytest.mark.parametrize(
    ("prompts", "fields", "kind", "field", "words"),
    [
        ([], {}, InvalidRequest, "inputs", "must hold 1 to 64, not 0"),
        ([[1]] * (MAX_EMBED_INPUTS + 1), {}, InvalidRequest, "inputs", "must hold 1 to 64, not 65"),
        ([[1], []], {}, InvalidRequest, "inputs", r"inputs\[1\]: the prompt is empty"),
        ([[1], [4096]], {}, InvalidRequest, "inputs", r"inputs\[1\]: token ids must be below 4096"),
        (
            [[1] * 513],
            {},
            InvalidRequest,
            "inputs",
            r"inputs\[0\]: the prompt has 513 tokens; the model's limit is 512",
        ),
        ([], {"inputs": NO_PROMPT}, InvalidRequest, "inputs", r"inputs\[0\]: the request has no prompt"),
        ([], {"inputs": NOT_UTF8}, InvalidRequest, "inputs", r"inputs\[1\]: the prompt is not valid UTF-8 at byte 1"),
        ([[1]], {"pooling": 9}, InvalidRequest, "pooling", "pooling must be last or mean"),
        ([[1]], {"model": "gpt-7"}, ModelNotFound, "model", "'gpt-7' is not served"),
        ([[1]], {"user_tag": "x" * 257}, InvalidRequest, "user_tag", "at most 256"),
    ],
)
async def test_what_is_wrong_is_named(
    house: House, prompts: list[list[int]], fields: dict[str, Any], kind: type[TandemError], field: str, words: str
) -> None:
    await house.join("p1", PREFILL)
    with pytest.raises(kind, match=words) as caught:
        await answer(call(house, *prompts, **fields))
    assert caught.value.field == field
    assert house.cluster.workers["p1"].embed_requests == []


async def test_a_prompt_of_the_models_whole_length_is_taken(house: House) -> None:
    await house.join("p1", PREFILL)
    assert (await answer(call(house, [3] * 512))).vectors == ((3, 512),)


async def test_vectors_that_no_message_holds_are_refused_before_they_are_computed() -> None:
    async with open_house(configuration(max_message_bytes=1 << 10)) as small:
        worker = await small.join("p1", PREFILL, model=replace(MODEL, hidden_size=100))
        words = "3 vectors of 100 numbers take 1260 bytes; router.max_message_bytes is 1024: embed fewer inputs at once"
        with pytest.raises(InvalidRequest, match=words) as caught:
            await answer(call(small, [1], [2], [3]))
        assert caught.value.field == "inputs"
        assert worker.embed_requests == []


async def test_a_stopping_router_ends_it_with_a_clear_error() -> None:
    async with AsyncExitStack() as outer:
        async with open_house_around(outer, configuration(drain_timeout_s=0.1)) as house:
            worker = await house.join("p1", PREFILL)
            worker.hold("embed")
            asked = asyncio.ensure_future(answer(call(house, [1])))
            await house.cluster.saw("embed")
        with pytest.raises(Unavailable, match="the router stopped before the request had ended"):
            await asked
        await eventually(lambda: house.cluster.happened("embed_cancelled"))
