"""The whole comparison: every shape's search by turns, then runs at common rates whose answers are kept."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Protocol

import tandem
from loadtest.compare import model
from loadtest.compare.contender import Contender, Ending, Offered
from loadtest.compare.judge import keeps
from loadtest.compare.processes import memory_gib, processor
from loadtest.compare.question import Question
from loadtest.compare.search import Search
from loadtest.compare.shapes import all_shapes
from loadtest.compare.verdict import best_of, verdict_on
from loadtest.runner import Run
from loadtest.session import Measuring
from loadtest.target import SendOptions
from tandem.errors import DeadlineExceeded

# Starts a shape's service; gives its router's address, and ends all of its processes on leaving.
Starter = Callable[[model.Shape], AbstractAsyncContextManager[str]]
# Of the time limit, what the search may take: the rest is for the runs that are shown.
SEARCH_SHARE = 0.75
# Of a load that other programs disturbed.
TRIES = 3


class Progress(Protocol):
    def stage(self, words: str) -> None:
        """What is being done."""

    def watch(self, run: Run) -> None:
        """The load that runs."""

    def ended(self, shape: model.Shape, run: model.Run, ending: Ending) -> None:
        """A load that has ended."""


class NothingFound(Exception):
    """Stopped before any shape was measured."""


@dataclass
class _Entry:
    """A contender, and what is known of it."""

    contender: Contender
    search: Search
    probes: list[model.Run] = field(default_factory=list)
    shown: list[model.ShownRun] = field(default_factory=list)

    @property
    def shape(self) -> model.Shape:
        return self.contender.shape

    def measured(self) -> model.Measured:
        best = next((run for run in self.probes if run.rate_rps == self.search.kept_rps), None)
        return model.Measured(
            shape=self.shape,
            probes=self.probes,
            best_rate_rps=self.search.kept_rps,
            goodput_rps=best.goodput_rps if best else 0.0,
            missed_rate_rps=self.search.missed_rps if math.isfinite(self.search.missed_rps) else None,
            shown=self.shown,
        )


class Comparing:
    """Runs one comparison. `stop` ends it early: what was found until then is reported."""

    def __init__(self, question: Question, start: Starter, stop: asyncio.Event, progress: Progress) -> None:
        self._question = question
        self._start = start
        self._stop = stop
        self._progress = progress
        self._measuring = Measuring(goodput=question.objectives)
        # On the monotonic clock; set when the loads begin.
        self._deadline_s: float | None = None
        self._search_deadline_s: float | None = None
        self._cut = False

    async def run(self, command: str) -> model.Comparison:
        """Raises TandemError when a service does not start or breaks, or the time limit is over before a measurement;
        NothingFound when stopped before one.

        All services stay up until the end: an idle one takes 0.4 % of a core for each process, and so no turn waits
        for a model to load.
        """
        async with AsyncExitStack() as services:
            entries = await self._entries(services)
            self._set_deadlines()
            await self._search(entries)
            await self._show(entries)
        return self._comparison(entries, command)

    async def _entries(self, services: AsyncExitStack) -> list[_Entry]:
        contenders = []
        for shape in all_shapes(self._question.workers, self._question.step_tokens):
            self._check_stop()
            self._progress.stage(f"starting {shape.name}")
            address = await services.enter_async_context(self._start(shape))
            sending = SendOptions(timeout_s=self._question.timeout_s)
            contenders.append(await services.enter_async_context(Contender.at(address, shape, sending)))
        alone = [await self._alone(contender) for contender in contenders]
        start_rps = self._question.start_rps or self._first_rate(alone)
        entries = [_Entry(contender, Search(start_rps, self._question.resolution)) for contender in contenders]
        for entry, run in zip(entries, alone, strict=True):
            if run.attainment == 0:  # and under load it gets no better
                entry.search.give_up()
                entry.probes.append(run)
        return entries

    def _set_deadlines(self) -> None:
        """How long services take to start, and on a fresh machine to compile their kernels, does not shorten loads."""
        if (limit_s := self._question.time_limit_s) is not None:
            now_s = time.monotonic()
            self._deadline_s, self._search_deadline_s = now_s + limit_s, now_s + limit_s * SEARCH_SHARE

    async def _alone(self, contender: Contender) -> model.Run:
        self._check_stop()
        self._progress.stage(f"warming up {contender.shape.name}")
        await contender.warm_up(self._question.plan, self._stop)
        self._check_stop()
        return await contender.alone(self._question.plan, self._question.objectives, self._stop)

    def _first_rate(self, alone: Sequence[model.Run]) -> float:
        """What all workers could prefill one by one: rather too high, and that is found out soonest."""
        ttfts_ms = [float(run.figures["median_ttft_ms"]) for run in alone if run.failed < run.offered]
        return self._question.workers * 1000 / max(min(ttfts_ms, default=1000.0), 1.0)

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise NothingFound

    async def _search(self, entries: list[_Entry]) -> None:
        """Round by round, one load for each that still searches; who goes first in one round goes last in the next."""
        turn = entries
        while any(not entry.search.done(_floor_rps(entry, entries)) for entry in entries):
            for entry in turn:
                floor_rps = _floor_rps(entry, entries)
                if not entry.search.done(floor_rps):
                    await self._probe(entry, entry.search.next_rps(floor_rps))
                if self._cut:
                    return
            turn = turn[::-1]

    async def _probe(self, entry: _Entry, rate_rps: float) -> None:
        offered = await self._offer(entry, rate_rps, self._search_deadline_s)
        if offered.ending is Ending.CUT:
            self._cut = True
            return
        entry.probes.append(offered.result)
        kept = offered.ending is Ending.WHOLE and keeps(offered.result.attainment, self._question.target)
        entry.search.learn(rate_rps, kept)

    async def _show(self, entries: list[_Entry]) -> None:
        """The best of either kind at the best rate of each, with other arrivals than in the search.

        If nobody kept any rate, at the lowest that was tried.
        """
        measured = [entry.measured() for entry in entries]
        best = [best_of(measured, split) for split in (False, True)]
        finalists = [entry for entry in entries if entry.shape in [each.shape for each in best]]
        tried = sorted(run.rate_rps for each in best for run in each.probes)
        rates = sorted({each.best_rate_rps for each in best if each.best_rate_rps}) or tried[:1]
        for number, rate_rps in enumerate(rates):
            for entry in finalists if number % 2 == 0 else finalists[::-1]:
                if self._halted(self._deadline_s):
                    self._cut = True
                    return
                offered = await self._offer(entry, rate_rps, self._deadline_s, shown=True)
                if offered.ending is Ending.CUT:
                    self._cut = True
                    return
                entry.shown.append(offered.shown())

    async def _offer(self, entry: _Entry, rate_rps: float, deadline_s: float | None, shown: bool = False) -> Offered:
        plan = self._question.plan_at(rate_rps, seed_offset=int(shown))
        halted = partial(self._halted, deadline_s)
        for _ in range(TRIES):
            self._progress.stage(f"{entry.shape.name}: {rate_rps:.2f} requests/s")
            offered = await entry.contender.offer(
                plan, self._measuring, self._question.target, halted, self._progress.watch, whole=shown
            )
            self._progress.ended(entry.shape, offered.result, offered.ending)
            # Disturbed and kept all the same is kept.
            kept = offered.ending is Ending.WHOLE and keeps(offered.result.attainment, self._question.target)
            if offered.ending is Ending.CUT or kept or not offered.disturbed:
                break
        return offered

    def _halted(self, deadline_s: float | None) -> bool:
        return self._stop.is_set() or (deadline_s is not None and time.monotonic() > deadline_s)

    def _comparison(self, entries: list[_Entry], command: str) -> model.Comparison:
        question, measured = self._question, [entry.measured() for entry in entries]
        if not any(each.probes for each in measured):
            if self._stop.is_set():
                raise NothingFound
            raise DeadlineExceeded(f"--time-limit {question.time_limit_s:g} was over before a load had ended")
        some = entries[0].contender
        cores = {core for entry in entries for worker in entry.contender.workers for core in worker.cores}
        return model.Comparison(
            tandem_version=tandem.__version__,
            date=datetime.now().astimezone().isoformat(timespec="seconds"),
            command=command,
            machine=model.Machine(
                processor=processor(), cores=len(cores), memory_gib=round(memory_gib(), 1), device=some.device
            ),
            model=some.served.model,
            workload=question.plan.as_json() | {"request_rate": None, "min_seconds": question.min_seconds},
            objectives=dict(question.objectives),
            target_attainment=question.target,
            measured=measured,
            verdict=verdict_on(measured, question.target, self._cut),
            interrupted=self._cut,
        )


def _floor_rps(entry: _Entry, entries: Sequence[_Entry]) -> float:
    """What the same workers have kept with other settings: only the best ones count."""
    rivals = [other for other in entries if other is not entry and other.shape.division == entry.shape.division]
    return max((rival.search.kept_rps for rival in rivals), default=0.0)
