"""Requests that could not meet their deadline are refused at once, by what was measured of the workers.

Their clock is the test's: deadlines are far off, and no machine is too slow for them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from http_house import error_of, http_configuration, open_http_house
from manual_clock import ManualClock
from router_house import House, collect, configuration, ids_of, next_event, open_house

from router.doors.http.chat_template import ChatTemplate
from router.pool.pace import OutputShare, PrefillPace
from tandem import AsyncClient, errors
from tandem.types import Accepted, Delta, FinishReason

# What one prompt of the warm-up takes.
PROMPT_S = 100.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> ManualClock:
    """The prefill workers'."""
    clock = ManualClock()
    monkeypatch.setattr("router.pool.books.PrefillPace", lambda: PrefillPace(clock))
    return clock


@pytest.fixture
async def house(clock: ManualClock) -> AsyncIterator[House]:
    async with open_house(configuration()) as opened:
        yield opened


async def measured(house: House, clock: ManualClock) -> None:
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
    clock.now_s += PROMPT_S
    prefill.let("start")
    await collect(calls[1])
    prefill.hold("first")


async def test_what_cannot_meet_its_deadline_reaches_no_worker(house: House, clock: ManualClock) -> None:
    await measured(house, clock)
    prefill = house.cluster.workers["p1"]
    ahead = [house.call(2, timeout=60 * PROMPT_S) for _ in range(3)]
    await house.cluster.saw("first", 5)
    async with AsyncClient(house.cluster.router) as client:
        with pytest.raises(errors.Overloaded, match="its deadline is in") as caught:
            await client.complete([1, 2, 3], max_tokens=2, timeout_s=3 * PROMPT_S)
        assert caught.value.retry_after_ms == 60_000, "at most"
        with pytest.raises(errors.Overloaded):
            await client.complete([1, 2, 3], max_tokens=2, n=10, timeout_s=10 * PROMPT_S)
    patient = house.call(2, timeout=60 * PROMPT_S)
    await house.cluster.saw("first", 6)
    assert len(prefill.prefill_requests) == 6
    prefill.let("first")
    for call in (*ahead, patient):
        assert len(ids_of(await collect(call))) == 2
    await house.check_empty()


async def test_a_service_that_refuses_finds_out_that_it_is_fast_again(house: House, clock: ManualClock) -> None:
    """With nobody ahead a request is tried whatever was measured, and the next ones go by what it took."""
    await measured(house, clock)
    prefill = house.cluster.workers["p1"]
    prefill.let("first")
    for _ in range(10):
        assert len(ids_of(await collect(house.call(2, timeout=0.9 * PROMPT_S)))) == 2, "less than the last one took"
    prefill.hold("first")
    ahead = house.call(2)
    await house.cluster.saw("first", 13)
    next_one = house.call(2, timeout=0.9 * PROMPT_S)
    await house.cluster.saw("first", 14)
    prefill.let("first")
    for call in (ahead, next_one):
        assert len(ids_of(await collect(call))) == 2


async def test_an_answer_that_is_cut_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    share = OutputShare()
    monkeypatch.setattr("router.life.request.OutputShare", lambda: share)
    async with open_house(configuration()) as house:
        prefill, _ = await house.pair()
        prefill.hold("seal")
        call = house.call(8)
        assert [type(await next_event(call)) for _ in range(2)] == [Accepted, Delta]
        assert share.expected(8) == 0
        call.cancel()
        await house.check_empty()
        assert share.expected(8) == 8
        prefill.let("seal")
        house.cluster.reason, house.cluster.output = FinishReason.STOP, [7, 8]
        await collect(house.call(8))
        assert 2 < share.expected(8) < 8


async def test_no_template_is_rendered_while_nothing_is_taken_in(monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: list[object] = []
    render = ChatTemplate.render
    monkeypatch.setattr(ChatTemplate, "render", lambda *given: (rendered.append(given), render(*given))[1])
    chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    async with open_http_house(http_configuration(max_live_requests=1)) as door:
        await door.house.pair()
        prefill = door.house.cluster.workers["p1"]
        prefill.hold("first")
        ahead = door.house.call(2)
        await door.house.cluster.saw("first")
        refused = await door.client.post("/v1/chat/completions", json=chat)
        assert (refused.status_code, error_of(refused)["code"]) == (429, "overloaded")
        assert int(refused.headers["retry-after-ms"]) > 0
        assert not rendered
        assert 'tandem_requests_total{outcome="overloaded"} 1.0' in (await door.client.get("/metrics")).text
        prefill.let("first")
        await collect(ahead)
        assert (await door.client.post("/v1/chat/completions", json=chat)).status_code == 200
        assert rendered
