"""What a client of the OpenAI door is told when the house is full, or a worker fails."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
from http_house import HttpHouse, error_of, http_configuration, open_http_house
from scripted_worker import ScriptedWorker

from tandem import errors


@pytest.fixture
async def door() -> AsyncIterator[HttpHouse]:
    async with open_http_house(http_configuration(max_live_requests=8)) as door:
        await door.house.join("c1")
        yield door
        await door.house.check_empty()


async def test_a_full_house_says_when_to_come_back(door: HttpHouse) -> None:
    worker = door.house.cluster.workers["c1"]
    worker.hold("first")
    waiting = [asyncio.create_task(door.complete()) for _ in range(8)]
    await door.house.cluster.saw("first", 8)
    refused = await door.complete()
    assert refused.status_code == 429
    assert error_of(refused) | {"message": ""} == {
        "message": "",
        "type": "rate_limit_error",
        "param": None,
        "code": "overloaded",
    }
    assert (refused.headers["retry-after"], refused.headers["retry-after-ms"]) == ("1", "1000")
    worker.let("first")
    assert {(await task).status_code for task in waiting} == {200}
    # A batch counts by answers; those of its prompts that were let in leave again.
    worker.hold("first")
    one = asyncio.create_task(door.complete())
    await door.house.cluster.saw("first", 9)
    assert (await door.complete(prompt=[[1, 2]] * 8)).status_code == 429
    worker.let("first")
    assert (await one).status_code == 200
    for fields, field in (({"prompt": [[1, 2]] * 9}, "prompt"), ({"prompt": [[1, 2]] * 5, "n": 2}, "n")):
        never = await door.complete(**fields)
        assert (never.status_code, error_of(never)["param"]) == (400, field)
        assert "the most this router takes is 8 (router.max_live_requests)" in error_of(never)["message"]
    await door.house.check_empty()


async def lose(door: HttpHouse, worker: ScriptedWorker) -> None:
    """What it held then is nobody's any more."""
    del door.house.cluster.workers[worker.id]
    await worker.kill()


async def test_a_failure_names_no_worker(door: HttpHouse) -> None:
    worker = door.house.cluster.workers["c1"]
    worker.hold("first")
    asked = asyncio.create_task(door.complete())
    await door.house.cluster.saw("first")
    await lose(door, worker)
    response = await asked
    assert response.status_code == 503
    assert error_of(response)["code"] == errors.WorkerLost.code
    assert "c1" not in response.text
    response = await door.complete()
    assert (response.status_code, error_of(response)["code"]) == (503, "unavailable")
    assert (response.headers["retry-after"], response.headers["retry-after-ms"]) == ("1", "1000")
    ready = await door.client.get("/ready")
    assert (ready.status_code, ready.headers["retry-after"]) == (503, "1")
    assert (await door.client.get("/health")).status_code == 200


async def test_a_stream_that_breaks_off_says_so(door: HttpHouse) -> None:
    worker = door.house.cluster.workers["c1"]
    worker.hold("decode")
    fields = {"prompt": [1, 2, 3], "max_tokens": 4, "stream": True}
    async with door.client.stream("POST", "/v1/completions", json=fields) as response:
        lines = response.aiter_lines()
        assert '"text"' in await anext(lines)
        await lose(door, worker)
        rest = [line async for line in lines if line]
    assert response.status_code == 200
    assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == errors.WorkerLost.code
    assert "[DONE]" not in "".join(rest)


async def test_readiness_is_about_the_way_through_both_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that live, but hand nothing over, are not ready; and they are again once they do."""
    monkeypatch.setattr("router.doors.http.probe.FRESH_S", 0.0)
    monkeypatch.setattr("router.doors.http.probe.PATIENCE_S", 0.3)
    async with open_http_house(http_configuration()) as door:
        prefill, decode = await door.house.pair()

        async def asked() -> tuple[int, str | None]:
            answer = await door.client.get("/ready")
            return answer.status_code, None if answer.status_code == 200 else error_of(answer)["code"]

        assert await asked() == (200, None)
        prefill.errors["seal"] = errors.TransferFailed("no frame of it came")
        assert await asked() == (503, errors.TransferFailed.code)
        del prefill.errors["seal"]
        decode.hold("decode")
        assert await asked() == (503, errors.DeadlineExceeded.code)
        decode.let("decode")
        decode.errors["reserve"] = errors.Overloaded("too many wait")
        assert await asked() == (503, errors.Overloaded.code)
        decode.errors.clear()
        assert await asked() == (200, None)
        await door.house.check_empty()
