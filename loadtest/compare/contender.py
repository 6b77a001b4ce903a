"""One shape that runs: offers it a load, and watches its processes meanwhile."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from enum import StrEnum

from loadtest.compare import model
from loadtest.compare.judge import Judge, is_disturbed
from loadtest.compare.processes import cores_of, cpu_seconds, others_cpu_seconds
from loadtest.metrics import Goodput, Metric, Outcome, missed, summarize
from loadtest.runner import Arrival, LoadRun, Runner, Watch
from loadtest.schedule.plan import Plan
from loadtest.session import DEFAULT_PERCENTILES, Measuring, figures, warm_up
from loadtest.targets.grpc import GrpcTarget
from loadtest.targets.target import SendOptions, Served
from tandem.client import AsyncClient, ServiceStatus, WorkerState
from tandem.errors import Unavailable
from tandem.types import Role

LOOK_S = 0.2
# What was cancelled is released within a second; a wait this long for it means that something is wrong.
IDLE_S = 30.0
# The supervisor waits half a minute at most before it starts a worker again; then the model is loaded.
READY_S = 300.0
# Requests one after the other, to see whether a shape can meet the objectives at all, and where the objectives are
# times of what these take.
ALONE, ALONE_AS_MEASURE = 3, 9


@dataclass(frozen=True)
class WatchedWorker:
    name: str
    pool: model.Pool
    pid: int
    cores: list[int]


class Ending(StrEnum):
    WHOLE = "whole"
    # Stopped because the target was out of reach already.
    HOPELESS = "hopeless"
    # Stopped because the whole comparison was: says nothing.
    CUT = "cut"


@dataclass(frozen=True)
class Offered:
    """What became of one load."""

    run: LoadRun
    ending: Ending
    result: model.Run

    @property
    def disturbed(self) -> bool:
        return is_disturbed(self.result)

    def shown(self) -> model.ShownRun:
        answers = [_answer(outcome, self.run, self.result) for outcome in self.run.outcomes]
        return model.ShownRun(**self.result.model_dump(), answers=answers)


@dataclass(frozen=True)
class Alone:
    """What requests saw that were sent one after the other."""

    arrivals: Sequence[Arrival]
    outcomes: Sequence[Outcome]
    seconds: float
    use: list[model.WorkerUse]
    # Workers that died meanwhile.
    lost: list[str]

    def median_ms(self, metric: Metric) -> float | None:
        """None if no answer has one."""
        figures = summarize(self.outcomes, self.seconds, DEFAULT_PERCENTILES, {})
        found: float | None = figures[f"median_{metric}_ms"]
        return found

    def judged(self, objectives: Goodput) -> model.Run:
        found = summarize(self.outcomes, self.seconds, DEFAULT_PERCENTILES, objectives)
        found["missed"] = Judge(self.arrivals, objectives, 1.0).causes(self.outcomes, time.perf_counter())
        return _result(len(self.outcomes) / self.seconds, found, self.use, self.lost)


class Contender:
    """A shape whose service runs. Every load gets a salt of its own: it finds nothing that another left in a cache."""

    def __init__(
        self,
        shape: model.ServiceShape,
        address: str,
        client: AsyncClient,
        served: Served,
        status: ServiceStatus,
        sending: SendOptions,
    ) -> None:
        self.shape = shape
        self.served = served
        self.workers = [_worker(state, shape) for state in status.workers]
        self.device = ", ".join(sorted({state.device for state in status.workers}))
        self._cores = {core for worker in self.workers for core in worker.cores}
        self._address = address
        self._client = client
        self._sending = sending

    @classmethod
    @asynccontextmanager
    async def at(cls, address: str, shape: model.ServiceShape, sending: SendOptions) -> AsyncIterator[Contender]:
        async with AsyncClient(address) as client:
            target = GrpcTarget(address, sending)
            try:
                served = await target.describe()
            finally:
                await target.close()
            yield cls(shape, address, client, served, await client.status(), sending)

    async def until_ready(self, plan: Plan, stop: asyncio.Event, halted: Callable[[], bool]) -> None:
        """Until as many workers serve as at first; those that were started again are warmed up. Returns if halted, as
        one that is stopped is.

        Raises Unavailable when they do not come back.
        """
        give_up_s, wanted = time.monotonic() + READY_S, Counter(worker.pool for worker in self.workers)
        while self._missing(status := await self._client.status()):
            found = [_worker(state, self.shape) for state in status.workers]
            if Counter(worker.pool for worker in found) == wanted:
                self.workers = found
                await self.warm_up(plan, stop)
            elif halted():
                return
            elif time.monotonic() > give_up_s:
                names = " and ".join(self._missing(status))
                raise Unavailable(f"nothing took the place of {names} within {READY_S:g} s")
            else:
                await asyncio.sleep(LOOK_S)

    def _missing(self, status: ServiceStatus) -> list[str]:
        """Workers that died or are lost to the router; one that was started again is another."""
        there = {(state.worker_id, state.pid) for state in status.workers}
        return [worker.name for worker in self.workers if (worker.name, worker.pid) not in there]

    async def warm_up(self, plan: Plan, stop: asyncio.Event) -> None:
        async with self._target() as target:
            await warm_up(target, plan.schedule(self.served).warm_up(4 * len(self.workers)), stop)
        await self._idle()

    async def alone(self, plan: Plan, count: int, stop: asyncio.Event) -> Alone:
        """So many requests, each sent when the one before it has ended."""
        schedule = replace(plan, num_prompts=count).schedule(self.served)
        outcomes: list[Outcome] = []
        before, started_s = self._cpu(), time.perf_counter()
        async with self._target() as target:
            for arrival in schedule.arrivals:
                run = await Runner(target, [Arrival(0.0, arrival.request)], None).send_all(stop)
                outcomes += run.outcomes
        seconds = time.perf_counter() - started_s
        use = self._use(before, seconds)
        return Alone(schedule.arrivals, outcomes, seconds, use, self._missing(await self._idle()))

    async def offer(
        self,
        plan: Plan,
        measuring: Measuring,
        target_attainment: float,
        halted: Callable[[], bool],
        watch: Watch,
        whole: bool = False,
    ) -> Offered:
        """To the end, or until it is hopeless (unless it has to be `whole`), or halted."""
        schedule = plan.schedule(self.served)
        judge = Judge(schedule.arrivals, measuring.goodput, 0.0 if whole else target_attainment)
        async with self._target() as target:
            before, others_before = self._cpu(), others_cpu_seconds(self._cores)
            run, ending = await _send(Runner(target, schedule.arrivals, None, watch), judge, halted)
            use, others = self._use(before, run.duration_s), others_cpu_seconds(self._cores)
            found = figures(target, plan, measuring, self.served, schedule, run)
        found["missed"] = judge.causes(run.outcomes, run.started_s + run.duration_s)
        lost = self._missing(await self._idle())
        # Share of the cores that other programs took: not known when one of ours ended and took its figures along.
        if self._cores and not lost and others is not None and others_before is not None:
            found["others_busy"] = max(0.0, others - others_before) / (run.duration_s * len(self._cores))
        assert plan.request_rate is not None
        return Offered(run, ending, _result(plan.request_rate, found, use, lost))

    @asynccontextmanager
    async def _target(self) -> AsyncIterator[GrpcTarget]:
        target = GrpcTarget(self._address, replace(self._sending, cache_salt=uuid.uuid4().hex))
        try:
            yield target
        finally:
            await target.close()

    async def _idle(self) -> ServiceStatus:
        """Until nothing of the last load is left."""
        give_up_s = time.monotonic() + IDLE_S
        while live := (status := await self._client.status()).live_requests:
            if time.monotonic() > give_up_s:
                raise Unavailable(f"{live} requests still live {IDLE_S:g} s after their load ended")
            await asyncio.sleep(LOOK_S)
        return status

    def _cpu(self) -> dict[str, float]:
        """CPU seconds by worker, of those where the system tells them."""
        seconds = {worker.name: cpu_seconds(worker.pid) for worker in self.workers}
        return {name: value for name, value in seconds.items() if value is not None}

    def _use(self, before: dict[str, float], seconds: float) -> list[model.WorkerUse]:
        """How busy the workers were, those that were there all the time."""
        now, found = self._cpu(), []
        for worker in self.workers:
            if worker.name in now and worker.name in before and worker.cores:
                busy = (now[worker.name] - before[worker.name]) / (seconds * len(worker.cores))
                found.append(
                    model.WorkerUse(worker=worker.name, pool=worker.pool, cores=worker.cores, busy=max(0.0, busy))
                )
        return found


def _worker(state: WorkerState, shape: model.ServiceShape) -> WatchedWorker:
    pool: model.Pool = "colocated" if not shape.is_split else "prefill" if Role.PREFILL in state.roles else "decode"
    return WatchedWorker(state.worker_id, pool, state.pid, cores_of(state.pid))


async def _send(runner: Runner, judge: Judge, halted: Callable[[], bool]) -> tuple[LoadRun, Ending]:
    stop, why = asyncio.Event(), Ending.WHOLE

    async def look() -> None:
        nonlocal why
        while why is Ending.WHOLE:
            await asyncio.sleep(LOOK_S)
            if halted():
                why = Ending.CUT
            elif judge.hopeless(runner.run.outcomes, time.perf_counter()):
                why = Ending.HOPELESS
        stop.set()

    looking = asyncio.create_task(look())
    try:
        run = await runner.send_all(stop)
    finally:
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)
    return run, why if run.interrupted else Ending.WHOLE


def _result(rate_rps: float, found: dict[str, object], use: list[model.WorkerUse], lost: list[str]) -> model.Run:
    scheduled = found["from_schedule"]
    assert isinstance(scheduled, dict)
    return model.Run.model_validate(
        {
            "rate_rps": rate_rps,
            "duration_s": found["duration"],
            "offered": found["offered"],
            "failed": found["failed"],
            "attainment": scheduled["attainment"] or 0.0,
            "goodput_rps": scheduled["request_goodput"],
            "figures": found,
            "use": use,
            "lost": lost,
        }
    )


def _answer(outcome: Outcome, run: LoadRun, result: model.Run) -> model.ShownAnswer:
    prefill_worker, decode_worker = outcome.workers or ("", "")
    return model.ShownAnswer(
        prompt_tokens=outcome.prompt_tokens,
        output_tokens=outcome.output_tokens,
        scheduled_s=outcome.scheduled_s - run.started_s,
        sent_s=outcome.start_s - run.started_s,
        arrivals_s=[at_s - run.started_s for at_s in outcome.arrivals_s],
        phases_ms=outcome.phases_ms,
        prefill_worker=prefill_worker,
        decode_worker=decode_worker,
        met=outcome.ok and not missed(outcome, outcome.scheduled_s, result.figures["goodput"]),
        failure=outcome.failure,
    )
