"""Requests that could not meet their deadline are refused at once, by what was measured of the workers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from router_house import House, collect, configuration, ids_of, open_house

from tandem import AsyncClient, errors

# What one prompt of the warm-up takes: three tokens in a second.
PROMPT_S = 1.0


@pytest.fixture
async def house() -> AsyncIterator[House]:
    async with open_house(configuration()) as opened:
        yield opened


async def measured(house: House, prompt_s: float = PROMPT_S) -> None:
    """The router knows that this prefill worker is slow. It is held again in the end."""
    prefill, _ = await house.pair()
    prefill.hold("first")
    calls = [house.call(2)]
    await house.cluster.saw("first")
    prefill.hold("start")
    calls.append(house.call(2))
    await house.cluster.saw("start", 2)
    prefill.let("first")
    await collect(calls[0])
    await asyncio.sleep(prompt_s)
    prefill.let("start")
    await collect(calls[1])
    prefill.hold("first")


async def test_what_cannot_meet_its_deadline_reaches_no_worker(house: House) -> None:
    await measured(house)
    prefill = house.cluster.workers["p1"]
    ahead = [house.call(2, timeout=60) for _ in range(3)]
    await house.cluster.saw("first", 5)
    async with AsyncClient(house.cluster.router) as client:
        with pytest.raises(errors.Overloaded, match="its deadline is in") as caught:
            await client.complete([1, 2, 3], max_tokens=2, timeout_s=3 * PROMPT_S)
        assert caught.value.retry_after_ms
        assert caught.value.retry_after_ms >= 1000 * PROMPT_S
        with pytest.raises(errors.Overloaded):
            await client.complete([1, 2, 3], max_tokens=2, n=10, timeout_s=10 * PROMPT_S)
    patient = house.call(2, timeout=60)
    await house.cluster.saw("first", 6)
    assert len(prefill.prefill_requests) == 6
    prefill.let("first")
    for call in (*ahead, patient):
        assert len(ids_of(await collect(call))) == 2
    await house.check_empty()


async def test_a_service_that_refuses_finds_out_that_it_is_fast_again(house: House) -> None:
    """With nobody ahead a request is tried whatever was measured, and the next ones go by what it took."""
    await measured(house, 2.5)
    prefill = house.cluster.workers["p1"]
    prefill.let("first")
    for _ in range(10):
        assert len(ids_of(await collect(house.call(2, timeout=2.4)))) == 2, "less than the last one took"
    prefill.hold("first")
    ahead = house.call(2, timeout=60)
    await house.cluster.saw("first", 13)
    next_one = house.call(2, timeout=2.4)
    await house.cluster.saw("first", 14)
    prefill.let("first")
    for call in (ahead, next_one):
        assert len(ids_of(await collect(call))) == 2
