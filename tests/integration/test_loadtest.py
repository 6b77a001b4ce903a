"""Load tests against servers with scripted delays: what is measured is what was done, and the loop stays open.

Figures must be those of the servers' notes within TOLERANCE_MS, which covers the two loops and the socket between. A
machine that is too busy for a server to keep its script proves nothing: then it is measured again, ATTEMPTS times at
most.
"""

from __future__ import annotations

import asyncio
import statistics
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from paced_service import FAST, OUTPUT, SLOW, Note, Pace, Scripted, joined, make_target, measured, target_of
from scripted_router import ScriptedRouter, serving

from loadtest.runner import Arrival, LoadRun, Runner
from loadtest.schedule.plan import Plan
from loadtest.schedule.workloads import Lengths, Vocabulary, random_requests
from loadtest.session import Measuring, Result

pytestmark = pytest.mark.alone

TOLERANCE_MS = 10.0
ATTEMPTS = 6
BOTH = pytest.mark.parametrize("kind", ["grpc", "openai"])


def plan(count: int, rate: float, input_tokens: int = 20) -> Plan:
    return Plan(num_prompts=count, request_rate=rate, lengths=Lengths(input_tokens, OUTPUT), seed=1)


async def undisturbed(kind: str, paces: list[Pace], load: Plan, measuring: Measuring) -> tuple[Result, Scripted]:
    for _ in range(ATTEMPTS):
        scripted = Scripted(paces)
        async with target_of(kind, scripted) as target:
            result = await measured(target, load, measuring)
        if scripted.kept():
            break
    return result, scripted


@BOTH
async def test_scripted_delays_come_back(kind: str) -> None:
    # Both limits lie far from both paces: half of the answers are good.
    measuring = Measuring(num_warmups=2, goodput={"ttft": 125, "tpot": 25}, percentiles=(25, 75))
    result, scripted = await undisturbed(kind, [FAST, SLOW], plan(40, 40), measuring)
    found, notes = result.figures, scripted.notes[2:]
    assert (found["offered"], found["completed"], found["failures"]) == (40, 40, {})
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (40 * 20, 40 * OUTPUT)

    ttfts = [(note.written_s[0] - note.asked_s) * 1000 for note in notes]
    e2els = [(note.written_s[-1] - note.asked_s) * 1000 for note in notes]
    tpots = [(e2el - ttft) / (OUTPUT - 1) for ttft, e2el in zip(ttfts, e2els, strict=True)]
    for name, by_server in (("ttft", ttfts), ("e2el", e2els), ("tpot", tpots), ("itl", tpots)):
        assert found[f"mean_{name}_ms"] == pytest.approx(statistics.mean(by_server), abs=TOLERANCE_MS), name
    # And the script was kept: half of the answers took the one pace, half the other.
    for name, fast_ms, slow_ms in (("ttft", 50, 200), ("tpot", 10, 40), ("e2el", 100, 400)):
        assert found[f"p25_{name}_ms"] == pytest.approx(fast_ms, abs=TOLERANCE_MS), name
        assert found[f"p75_{name}_ms"] == pytest.approx(slow_ms, abs=TOLERANCE_MS), name

    assert found["request_goodput"] == pytest.approx(20 / found["duration"], rel=0.06)
    assert found["attainment"] == pytest.approx(0.5, abs=0.03)
    # 40 arrivals at 40 a second, then the last answer.
    assert 1.0 + 0.4 <= found["duration"] < 3.0
    assert found["request_throughput"] == pytest.approx(40 / found["duration"])


@BOTH
async def test_a_server_that_stalls_does_not_slow_the_arrivals(kind: str) -> None:
    """Until half a second after the last request came, only the first one is answered: nobody waits for the others.

    That the run ends at all proves it: a loop that waited for an answer would never send the last request.
    """
    opened = threading.Event()

    class Stalling(Scripted):
        async def answer(self, write: Callable[[], Awaitable[None]]) -> None:
            if self.notes:
                note = Note(time.perf_counter())
                self.notes.append(note)
                await asyncio.to_thread(opened.wait, 30)
                await write()
            else:
                await super().answer(write)

    scripted = Stalling([FAST])
    schedule = plan(30, 60)

    async def open_late() -> float:
        while len(scripted.notes) < 30:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.5)
        opened.set()
        return time.perf_counter()

    async with target_of(kind, scripted) as target:
        opening = asyncio.create_task(asyncio.wait_for(open_late(), 30))
        result = await measured(target, schedule)
    opened_s = await opening
    outcomes = result.run.outcomes
    # Every request was at the server when it was due, though the ones before it had no answer yet.
    due = [each.scheduled_s for each in outcomes]
    late_ms = [(note.asked_s - at_s) * 1000 for note, at_s in zip(scripted.notes, due, strict=True)]
    assert statistics.median(late_ms) < 250
    # And what the stall cost is in the figures, from the schedule on.
    expected = [(opened_s - at_s) * 1000 for at_s in due[1:]]
    ours = [(each.arrivals_s[0] - each.scheduled_s) * 1000 for each in outcomes[1:]]
    assert statistics.mean(ours) == pytest.approx(statistics.mean(expected), abs=10 * TOLERANCE_MS)
    assert result.figures["from_schedule"]["mean_ttft_ms"] > 500


@BOTH
async def test_waiting_at_the_client_is_not_omitted(kind: str) -> None:
    """One at a time, all due at once: from sending all look alike; from the schedule each waits for those before it."""
    load = Plan(num_prompts=8, lengths=Lengths(5, OUTPUT))
    result, _ = await undisturbed(kind, [Pace(0.05, 0.0)], load, Measuring(max_concurrency=1))
    found = result.figures
    assert found["median_ttft_ms"] == pytest.approx(50, abs=TOLERANCE_MS)
    assert found["from_schedule"]["median_ttft_ms"] == pytest.approx(4.5 * 50, abs=6 * TOLERANCE_MS)
    assert found["mean_client_queue_time_ms"] == pytest.approx(3.5 * 50, abs=6 * TOLERANCE_MS)


async def test_a_run_that_is_stopped_reports_what_was() -> None:
    stop = asyncio.Event()

    async def second_hangs(request: Any, emit: Any) -> None:
        if len(router.requests) > 1:
            await asyncio.Event().wait()
        await Scripted([FAST]).by_grpc(request, emit)

    def watch(run: LoadRun) -> None:
        if run.ended == 1:
            stop.set()

    router = ScriptedRouter(second_hangs, joined())
    with serving(router):
        target = make_target("grpc", router.address)
        # Two are due in the beginning, the others in an hour.
        requests = random_requests(4, Lengths(5, 2), Vocabulary(100, 0))
        schedule = [Arrival(at_s, each) for at_s, each in zip((0.0, 0.02, 3600.0, 3600.0), requests, strict=True)]
        run = await asyncio.wait_for(Runner(target, schedule, None, watch).send_all(stop), 20)
        assert await asyncio.to_thread(router.cancelled.wait, 5)
        await target.close()
    assert [outcome.failure for outcome in run.outcomes] == [None, "interrupted"]
    assert (run.interrupted, run.planned) == (True, 4)
    assert run.duration_s < 20
