"""`tandem bench compare` while workers are killed: real services of the tiny model."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import pytest
import pytest_asyncio

from loadtest.compare import contender, model, search
from loadtest.compare.comparing import TRIES, Comparing
from loadtest.compare.contender import Ending
from loadtest.compare.question import Question
from loadtest.compare.shapes import all_shapes
from loadtest.metrics import Goodput
from loadtest.objectives import Objectives
from loadtest.runner import LoadRun
from loadtest.schedule.plan import Plan
from loadtest.schedule.workloads import Lengths
from tandem.cli.bench.compare import settings_of
from tandem.config import load_config
from tandem.engine.backends.cores import usable_cores
from tandem.launch.processes import Supervisor

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(len(usable_cores()) < 2, reason="two workers need two cores"),
    pytest.mark.timeout(400),
]

LOAD = Plan(num_prompts=40, lengths=Lengths(40, 30), seed=1)
SHAPES = all_shapes(2, [64])
MIXED, SPLIT = (shape.name for shape in SHAPES)


@pytest.fixture(autouse=True)
def few_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rate is kept: no search doubles it more than twice. What else runs on this machine repeats no load."""
    monkeypatch.setattr(search, "_FURTHEST", 4.0)
    monkeypatch.setattr(contender, "others_cpu_seconds", lambda cores: 0.0)


@dataclass
class Killer:
    """Follows the loads on the services, and ends a worker in the middle of some of them.

    Until every request has been sent the workers are stopped, so that the one that ends takes its share of them along,
    however late this process sees what they have answered.
    """

    supervisors: dict[str, Supervisor]
    # How often, by shape; which of its workers.
    deaths: dict[str, int]
    victims: dict[str, str]
    killed: list[tuple[str, int]] = field(default_factory=list)
    failed_shapes: list[str] = field(default_factory=list)
    _shape: str = ""
    _armed: bool = False

    @asynccontextmanager
    async def start(self, shape: model.ServiceShape) -> AsyncIterator[str]:
        yield self.supervisors[shape.name].address

    def report_stage(self, words: str) -> None:
        self._shape, _, load = words.rpartition(": ")
        self._armed = bool(load) and self.deaths.get(self._shape, 0) > 0

    def report_run(self, run: LoadRun) -> None:
        if not self._armed:
            return
        pids = self.supervisors[self._shape].pids()
        workers = {name: pid for name, pid in pids.items() if name != "router"}
        if len(run.outcomes) == 1:
            for pid in workers.values():
                os.kill(pid, signal.SIGSTOP)
        elif len(run.outcomes) == run.planned:
            self._armed = False
            self.deaths[self._shape] -= 1
            self._kill(workers.pop(self.victims[self._shape]))
            for pid in workers.values():
                os.kill(pid, signal.SIGCONT)

    def _kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        self.killed.append((self._shape, pid))

    def report_limits(self, goodput: Goodput) -> None: ...

    def report_ended(self, shape: model.ServiceShape, run: model.Run, ending: Ending) -> None: ...

    def report_failed(self, shape: model.ServiceShape, why: str) -> None:
        self.failed_shapes.append(shape.name)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def services() -> AsyncIterator[dict[str, Supervisor]]:
    """Of each shape; both comparisons use them, the one that leaves them whole first."""
    settings = load_config(None, {"router": {"port": 0, "http_port": -1}, "engine": {"kv_memory_mib": 32}})
    supervisors = {shape.name: Supervisor(settings_of(settings, shape), output=None) for shape in SHAPES}
    async with AsyncExitStack() as stack:
        await asyncio.gather(*(stack.enter_async_context(each) for each in supervisors.values()))
        yield supervisors


async def compared(services: dict[str, Supervisor], deaths: dict[str, int]) -> tuple[model.Comparison, Killer]:
    killer = Killer(services, deaths, {MIXED: "worker-0", SPLIT: "decode-0"})
    question = Question(
        plan=LOAD,
        objectives=Objectives({"ttft": 20_000.0}),
        workers=2,
        step_tokens=(64,),
        min_seconds=0.0,
        resolution=1.0,
        draws=1,
        start_rps=200.0,
    )
    found = await Comparing(question, killer.start, asyncio.Event(), killer).compare("tandem bench compare")
    assert all(count == 0 for count in deaths.values()), "every fault took effect"
    return found, killer


async def test_the_verdict_is_of_those_that_are_left_whole(services: dict[str, Supervisor]) -> None:
    found, killer = await compared(services, {SPLIT: 1})
    assert killer.failed_shapes == []
    assert [each.failure for each in found.measured] == [None, None]
    assert [len(each.broken) for each in found.measured] == [0, 1]
    assert all(each.best_rate_rps and each.draws for each in found.measured)
    assert any("1P1D lost" in sentence for sentence in found.verdict.text)
    assert len(found.verdict.pairs) == 1


async def test_a_worker_that_dies_costs_one_load_and_one_that_keeps_dying_its_shape(
    services: dict[str, Supervisor],
) -> None:
    found, killer = await compared(services, {MIXED: 1, SPLIT: TRIES})
    mixed, split = found.measured
    assert sorted(name for name, _ in killer.killed) == sorted([MIXED, *[SPLIT] * TRIES])

    assert mixed.failure is None
    (broken,) = mixed.broken
    assert len(broken.lost) == 1
    assert broken.failed > 4
    assert broken.attainment < 0.9
    assert "others_busy" not in broken.figures
    again = mixed.probes[0]
    assert (again.rate_rps, again.lost, again.failed) == (200.0, [], 0)
    assert mixed.best_rate_rps > 200
    assert len(mixed.probes) > 1

    assert killer.failed_shapes == [SPLIT]
    assert split.failure == f"workers died in {TRIES} loads at 200.00 requests/s"
    assert [len(run.lost) for run in split.broken] == [1] * TRIES
    assert len({name for run in split.broken for name in run.lost}) == TRIES, "each time it had been started again"
    assert split.probes == []

    text = found.verdict.text
    assert text[0].startswith("Nothing can be said of splitting")
    assert any(f"{MIXED} lost {broken.lost[0]} during a load at 200.00 requests/s" in sentence for sentence in text)
    assert any(sentence.startswith(f"{SPLIT} failed and is left out of the comparison") for sentence in text)
