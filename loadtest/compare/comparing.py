"""The whole comparison: every shape's search by turns, then the same draws of arrivals for the best of either kind."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Protocol

import tandem
from loadtest.compare import model
from loadtest.compare.contender import ALONE, ALONE_AS_MEASURE, Alone, Contender, Ending, Offered
from loadtest.compare.judge import keeps
from loadtest.compare.processes import memory_gib, processor
from loadtest.compare.question import Question
from loadtest.compare.search import Search
from loadtest.compare.shapes import all_shapes
from loadtest.compare.verdict import best_of, common_rate, verdict_on
from loadtest.metrics import Goodput
from loadtest.runner import LoadRun
from loadtest.session import Measuring, nothing_answered
from loadtest.targets.target import SendOptions
from tandem.errors import DeadlineExceeded, TandemError, Unavailable

# Starts a shape's service; gives its router's address, and ends all of its processes on leaving.
Starter = Callable[[model.ServiceShape], AbstractAsyncContextManager[str]]
# Share of the time limit that the search may take: the rest is for the draws, which decide.
SEARCH_SHARE = 0.4
# Tries of a load that other programs disturbed, and of one during which workers died.
TRIES = 3


class Reporter(Protocol):
    def report_stage(self, words: str) -> None:
        """What is being done."""

    def report_limits(self, goodput: Goodput) -> None:
        """What an answer may take: known before the first load."""

    def report_run(self, run: LoadRun) -> None:
        """The load that runs."""

    def report_ended(self, shape: model.ServiceShape, run: model.Run, ending: Ending) -> None:
        """A load that has ended."""

    def report_failed(self, shape: model.ServiceShape, why: str) -> None:
        """The comparison goes on without the shape."""


class NothingFound(Exception):
    """Stopped before any shape was measured."""


@dataclass
class _Entry:
    """A contender, and what is known of it."""

    contender: Contender
    search: Search
    # Requests one after the other.
    alone: Alone | None = None
    # Those in which a worker died.
    alone_broken: list[Alone] = field(default_factory=list)
    probes: list[model.Run] = field(default_factory=list)
    draws: list[model.Run] = field(default_factory=list)
    shown: list[model.ShownRun] = field(default_factory=list)
    broken: list[model.Run] = field(default_factory=list)
    # Why there is no going on with it.
    failure: TandemError | None = None

    @property
    def shape(self) -> model.ServiceShape:
        return self.contender.shape

    def searches(self, entries: Sequence[_Entry]) -> bool:
        return self.failure is None and not self.search.done(self.floor_rps(entries))

    def floor_rps(self, entries: Sequence[_Entry]) -> float:
        """What the same workers have kept with other settings: only the best ones count."""
        rivals = (other for other in entries if other is not self and other.failure is None)
        same = (rival for rival in rivals if rival.shape.division == self.shape.division)
        return max((rival.search.kept_rps for rival in same), default=0.0)

    def measured(self) -> model.Measured:
        return model.Measured(
            shape=self.shape,
            probes=self.probes,
            best_rate_rps=self.search.kept_rps,
            missed_rate_rps=self.search.missed_rps if math.isfinite(self.search.missed_rps) else None,
            draws=self.draws,
            shown=self.shown,
            broken=self.broken,
            failure=None if self.failure is None else self.failure.message,
        )


class Comparing:
    """Runs one comparison. `stop` ends it early: what was found until then is reported."""

    def __init__(self, question: Question, start: Starter, stop: asyncio.Event, reporter: Reporter) -> None:
        self._question = question
        self._start = start
        self._stop = stop
        self._reporter = reporter
        # With the objectives in milliseconds, once it is known what an answer takes alone.
        self._measuring = Measuring()
        # On the monotonic clock; set when the loads begin.
        self._deadline_s: float | None = None
        self._search_deadline_s: float | None = None
        self._cut = False

    async def compare(self, command: str) -> model.Comparison:
        """Raises TandemError when a service does not start, all of them break, or the time limit is over before a
        measurement; NothingFound when stopped before one.

        All services stay up until the end: an idle one takes 0.4 % of a core for each process, and so no turn waits
        for a model to load.
        """
        async with AsyncExitStack() as services:
            entries = await self._entries(services)
            # How long services take to start, and on a fresh machine to compile their kernels, does not shorten loads.
            if (limit_s := self._question.time_limit_s) is not None:
                now_s = time.monotonic()
                self._deadline_s, self._search_deadline_s = now_s + limit_s, now_s + limit_s * SEARCH_SHARE
            await self._search(entries)
            await self._draw(entries)
        return self._comparison(entries, command)

    async def _entries(self, services: AsyncExitStack) -> list[_Entry]:
        entries: list[_Entry] = []
        for shape in all_shapes(self._question.workers, self._question.step_tokens):
            self._check_stop()
            self._reporter.report_stage(f"starting {shape.name}")
            address = await services.enter_async_context(self._start(shape))
            sending = SendOptions(timeout_s=self._question.timeout_s)
            contender = await services.enter_async_context(Contender.at(address, shape, sending))
            if not entries:  # before the other services start: a load that the model cannot take fits none of them
                self._question.plan.schedule(contender.served)
            entries.append(_Entry(contender, Search(1.0, self._question.resolution)))
        for entry in entries:
            try:
                entry.alone = await self._alone(entry)
            except TandemError as error:
                entry.failure = error
        _check_some_work(entries)
        for entry in entries:
            if entry.failure is not None:
                self._reporter.report_failed(entry.shape, entry.failure.message)
        alone = [(entry, entry.alone) for entry in entries if entry.alone is not None]
        limits_ms = self._limits_ms([each for _, each in alone])
        self._measuring = Measuring(goodput=limits_ms)
        self._reporter.report_limits(limits_ms)
        for entry in entries:
            entry.broken += [each.judged(limits_ms) for each in entry.alone_broken]
        self._begin([(entry, each.judged(limits_ms)) for entry, each in alone])
        return entries

    def _limits_ms(self, alone: Sequence[Alone]) -> Goodput:
        """The same for all shapes: in times of what the fastest takes, metric by metric.

        Raises Unavailable if nothing was answered, ConfigError if answers have no such metric.
        """
        objectives = self._question.objectives
        outcomes = [outcome for each in alone for outcome in each.outcomes]
        if objectives.times_alone and not any(outcome.ok for outcome in outcomes):
            raise nothing_answered(outcomes, "request without load")
        medians = {metric: [each.median_ms(metric) for each in alone] for metric in objectives.times_alone}
        return objectives.in_ms({metric: min(filter(None, values), default=0) for metric, values in medians.items()})

    def _begin(self, alone: Sequence[tuple[_Entry, model.Run]]) -> None:
        """Every search begins at the same rate: what all workers could prefill one by one, if none is given. That is
        rather too high, and that is found out soonest.
        """
        ttfts_ms = [float(run.figures["median_ttft_ms"]) for _, run in alone if run.failed < run.offered]
        first_rps = self._question.workers * 1000 / max(min(ttfts_ms, default=1000.0), 1.0)
        start_rps = self._question.start_rps or first_rps
        for entry, run in alone:
            entry.search.start_rps = start_rps
            if run.attainment == 0:  # and under load it gets no better
                entry.search.give_up()
                entry.probes.append(run)

    async def _alone(self, entry: _Entry) -> Alone:
        contender, plan = entry.contender, self._question.plan
        count = ALONE_AS_MEASURE if self._question.objectives.times_alone else ALONE
        self._check_stop()
        self._reporter.report_stage(f"warming up {contender.shape.name}")
        await contender.warm_up(plan, self._stop)
        for _ in range(TRIES):
            await contender.until_ready(plan, self._stop, self._stop.is_set)
            self._check_stop()
            alone = await contender.alone(plan, count, self._stop)
            self._check_stop()
            if not alone.lost:
                return alone
            entry.alone_broken.append(alone)
        raise _keeps_dying("without load")

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise NothingFound

    async def _search(self, entries: list[_Entry]) -> None:
        """Round by round, one load for each that still searches; who goes first in one round goes last in the next."""
        turn = entries
        while any(entry.searches(entries) for entry in entries):
            for entry in turn:
                if entry.searches(entries):
                    try:
                        await self._probe(entry, entry.search.next_rps(entry.floor_rps(entries)))
                    except TandemError as error:  # takes its shape out of the comparison, and the others go on
                        entry.failure = error
                        self._reporter.report_failed(entry.shape, error.message)
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

    async def _draw(self, entries: list[_Entry]) -> None:
        """The best of either kind get the same draws of arrivals by turns, A B B A. The search has seen none."""
        measured = [entry.measured() for entry in entries]
        best = [best_of(measured, split) for split in (False, True)]
        rate_rps = common_rate(best)
        finalists = [entry for entry in entries if entry.shape in [each.shape for each in best] and not entry.failure]
        # One that is left alone is only to be seen.
        for draw in range(1, (self._question.draws if len(finalists) == 2 else 1) + 1):
            for entry in finalists if draw % 2 else finalists[::-1]:
                if self._halted(self._deadline_s):
                    self._cut = True
                    return
                try:
                    offered = await self._offer(entry, rate_rps, self._deadline_s, draw)
                except TandemError as error:  # what was found until then stands
                    self._reporter.report_failed(entry.shape, error.message)
                    return
                if offered.ending is Ending.CUT:
                    self._cut = True
                    return
                entry.draws.append(offered.result)
                if draw == 1:
                    entry.shown.append(offered.shown())

    async def _offer(self, entry: _Entry, rate_rps: float, deadline_s: float | None, draw: int = 0) -> Offered:
        """Again while it is no fair measure. Raises Unavailable when workers keep dying.

        draw: see Question.plan_at; those that decide go to their end.
        """
        plan = self._question.plan_at(rate_rps, draw)
        halted, tries = partial(self._halted, deadline_s), Counter[bool]()
        while True:
            self._reporter.report_stage(f"{entry.shape.name}: {rate_rps:.2f} requests/s")
            await entry.contender.until_ready(plan, self._stop, halted)
            offered = await entry.contender.offer(
                plan, self._measuring, self._question.target, halted, self._reporter.report_run, whole=draw > 0
            )
            self._reporter.report_ended(entry.shape, offered.result, offered.ending)
            # What the search saw kept all the same is kept; a draw counts as it is.
            kept = (
                not draw and offered.ending is Ending.WHOLE and keeps(offered.result.attainment, self._question.target)
            )
            lost = bool(offered.result.lost)
            if offered.ending is Ending.CUT or kept or not (lost or offered.disturbed):
                return offered
            if lost:
                entry.broken.append(offered.result)
            tries[lost] += 1
            if tries[True] == TRIES:
                raise _keeps_dying(f"at {rate_rps:.2f} requests/s")
            if tries[False] == TRIES:
                return offered

    def _halted(self, deadline_s: float | None) -> bool:
        return self._stop.is_set() or (deadline_s is not None and time.monotonic() > deadline_s)

    def _comparison(self, entries: list[_Entry], command: str) -> model.Comparison:
        question, measured = self._question, [entry.measured() for entry in entries]
        if not any(each.probes for each in measured):
            _check_some_work(entries)
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
            objectives=dict(self._measuring.goodput),
            times_alone=dict(question.objectives.times_alone),
            target_attainment=question.target,
            measured=measured,
            verdict=verdict_on(measured, question.target, self._cut),
            interrupted=self._cut,
        )


def _check_some_work(entries: Sequence[_Entry]) -> None:
    """Raises what broke the first service if all of them broke."""
    failures = [entry.failure for entry in entries if entry.failure is not None]
    if len(failures) == len(entries):
        raise failures[0]


def _keeps_dying(where: str) -> Unavailable:
    return Unavailable(f"workers died in {TRIES} loads {where}")
