"""Comparisons that look like real ones: small simulated workers, and the real figures of what they did."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from loadtest import metrics
from loadtest.compare.model import (
    Comparison,
    Machine,
    Measured,
    Pool,
    Run,
    ServiceShape,
    ShownAnswer,
    ShownRun,
    WorkerUse,
)
from loadtest.compare.verdict import verdict_on
from tandem.timeline import Phase

OBJECTIVES: dict[metrics.Metric, float] = {"ttft": 1200.0, "tpot": 45.0}
TARGET = 0.9
TWO = (ServiceShape(colocated=2, step_tokens=64), ServiceShape(prefill=1, decode=1, step_tokens=512))
FOUR = (
    ServiceShape(colocated=4, step_tokens=64),
    ServiceShape(colocated=4, step_tokens=512),
    ServiceShape(prefill=1, decode=3, step_tokens=512),
    ServiceShape(prefill=2, decode=2, step_tokens=512),
    ServiceShape(prefill=3, decode=1, step_tokens=512),
)

# Seconds of a step: at least, for each prompt token, for each answer that decodes.
STEP_S, PROMPT_TOKEN_S, DECODE_S = 0.009, 0.0005, 0.0012
HANDOFF_S = 0.012


@dataclass
class _Job:
    due_s: float
    prompt: int
    output: int
    # When it may start on the engine that has it now, and what is left of the prompt there.
    ready_s: float = 0.0
    prompt_left: int = 0
    tokens_left: int = 0
    arrivals_s: list[float] = field(default_factory=list)
    started_s: float = 0.0
    sealed_s: float | None = None
    workers: tuple[str, str] = ("", "")


class _Engine:
    """Decode first, then chunks of prompts in the order in which they came, up to a budget of tokens a step."""

    def __init__(self, name: str, pool: Pool, core: int, step_tokens: int) -> None:
        self.name, self.pool, self.core, self._step_tokens = name, pool, core, step_tokens
        self.busy_s = 0.0

    def run(self, jobs: Sequence[_Job]) -> None:
        waiting, active, now_s = sorted(jobs, key=lambda job: job.ready_s), list[_Job](), 0.0
        while waiting or active:
            if not active:
                now_s = max(now_s, waiting[0].ready_s)
            while waiting and waiting[0].ready_s <= now_s:
                active.append(waiting.pop(0))
            took_s = self._step(active, now_s)
            now_s, self.busy_s = now_s + took_s, self.busy_s + took_s
            active = [job for job in active if job.tokens_left]

    def _step(self, active: Sequence[_Job], now_s: float) -> float:
        decoding = [job for job in active if not job.prompt_left]
        budget, chunks, ends = self._step_tokens - len(decoding), 0, list[_Job]()
        for job in active:
            take = min(job.prompt_left, budget)
            if take <= 0:
                continue
            job.started_s = job.started_s or now_s
            job.prompt_left, budget, chunks = job.prompt_left - take, budget - take, chunks + take
            if not job.prompt_left:
                ends.append(job)
        took_s = STEP_S + chunks * PROMPT_TOKEN_S + len(decoding) * DECODE_S
        for job in [*decoding, *ends]:
            job.arrivals_s.append(now_s + took_s)
            job.tokens_left -= 1
        return took_s


def _engines(shape: ServiceShape) -> dict[Pool, list[_Engine]]:
    counts: dict[Pool, int] = {"prefill": shape.prefill, "decode": shape.decode, "colocated": shape.colocated}
    names = [(pool, index) for pool, count in counts.items() for index in range(count)]
    made: dict[Pool, list[_Engine]] = {pool: [] for pool in counts}
    for core, (pool, index) in enumerate(names):
        made[pool].append(_Engine(f"{pool}-{index}", pool, core, shape.step_tokens))
    return made


def _serve(shape: ServiceShape, jobs: Sequence[_Job]) -> list[_Engine]:
    engines = _engines(shape)
    first = engines["prefill"] or engines["colocated"]
    for index, engine in enumerate(first):
        mine = list(jobs[index :: len(first)])
        for job in mine:
            job.ready_s, job.prompt_left, job.workers = job.due_s, job.prompt, (engine.name, engine.name)
            job.tokens_left = 1 if shape.is_split else job.output
        engine.run(mine)
    for index, engine in enumerate(engines["decode"]):
        mine = list(jobs[index :: shape.decode])
        for job in mine:
            job.sealed_s = job.ready_s = job.arrivals_s[0] + HANDOFF_S
            job.tokens_left, job.workers = job.output - 1, (job.workers[0], engine.name)
        engine.run([job for job in mine if job.tokens_left])
    return [each for pool in engines.values() for each in pool]


def _phases(job: _Job) -> dict[str, float]:
    at_s = {
        Phase.RECEIVED: job.due_s,
        Phase.ADMITTED: job.due_s + 0.0005,
        Phase.RESERVED: job.due_s + 0.001,
        Phase.PREFILL_STARTED: job.started_s,
        Phase.FIRST_TOKEN: job.arrivals_s[0],
        Phase.DECODE_STARTED: job.arrivals_s[1] - 0.01,
        Phase.FINISHED: job.arrivals_s[-1],
    }
    if job.sealed_s is not None:
        at_s[Phase.KV_SEALED] = job.sealed_s
    return {phase.value: (at_s[phase] - job.due_s) * 1000 for phase in Phase if phase in at_s}


def _jobs(rate_rps: float, count: int, seed: int) -> list[_Job]:
    drawn, at_s, jobs = random.Random(seed), 0.0, []
    for _ in range(count):
        at_s += drawn.expovariate(rate_rps)
        jobs.append(_Job(at_s, drawn.randrange(256, 768), drawn.randrange(24, 64)))
    return jobs


def _met(job: _Job) -> bool:
    tpot_s = (job.arrivals_s[-1] - job.arrivals_s[0]) / (job.output - 1)
    ttft_s = job.arrivals_s[0] - job.due_s
    return ttft_s * 1000 <= OBJECTIVES["ttft"] and tpot_s * 1000 <= OBJECTIVES["tpot"]


def _answer(job: _Job, failed: bool) -> ShownAnswer:
    told: dict[str, Any] = {"phases_ms": _phases(job), "met": _met(job), "arrivals_s": job.arrivals_s}
    if failed:
        told = {"phases_ms": {}, "met": False, "arrivals_s": [], "failure": "overloaded"}
    return ShownAnswer(
        prompt_tokens=job.prompt,
        output_tokens=job.output,
        scheduled_s=job.due_s,
        sent_s=job.due_s,
        prefill_worker="" if failed else job.workers[0],
        decode_worker="" if failed else job.workers[1],
        **told,
    )


def made_run(shape: ServiceShape, rate_rps: float, count: int = 120, seed: int = 7, failures: int = 0) -> ShownRun:
    """The same seed and rate give the same requests at the same times, whatever the shape."""
    jobs = _jobs(rate_rps, count, seed)
    engines = _serve(shape, jobs)
    duration_s = max(job.arrivals_s[-1] for job in jobs)
    outcomes = [metrics.Outcome(job.due_s, job.prompt, job.due_s, job.arrivals_s, job.output) for job in jobs]
    for each in outcomes[:failures]:
        each.set_failure("overloaded", "no room")
    figures = metrics.summarize(outcomes, duration_s, (50, 90, 95, 99), OBJECTIVES)
    missed = (metrics.missed(each, each.scheduled_s, OBJECTIVES) if each.ok else ["failed"] for each in outcomes)
    figures["missed"] = dict(Counter(name for names in missed for name in names))
    good = sum(_met(job) for job in jobs[failures:])
    return ShownRun(
        rate_rps=rate_rps,
        duration_s=duration_s,
        offered=count,
        failed=failures,
        attainment=good / count,
        goodput_rps=good / duration_s,
        figures=figures,
        use=[WorkerUse(worker=e.name, pool=e.pool, cores=[e.core], busy=e.busy_s / duration_s) for e in engines],
        answers=[_answer(job, index < failures) for index, job in enumerate(jobs)],
    )


def _plain(run: ShownRun) -> Run:
    return Run(**{name: getattr(run, name) for name in Run.model_fields})


def _as_probe(run: ShownRun) -> Run:
    """One that misses the target is stopped early."""
    return _plain(run).model_copy(update={"figures": run.figures | {"interrupted": run.attainment < TARGET}})


def made_measured(
    shape: ServiceShape, probes: Sequence[float], shown: Sequence[float], draws_at: float | None = None, **options: Any
) -> Measured:
    runs = [_as_probe(made_run(shape, rate, **options)) for rate in probes]
    best = max((run for run in runs if run.attainment >= TARGET), key=lambda run: run.rate_rps, default=None)
    return Measured(
        shape=shape,
        probes=runs,
        best_rate_rps=best.rate_rps if best else 0.0,
        missed_rate_rps=min((run.rate_rps for run in runs if run.attainment < TARGET), default=None),
        draws=[_plain(made_run(shape, draws_at, seed=8 + draw, **options)) for draw in range(5)] if draws_at else [],
        shown=[made_run(shape, rate, **options) for rate in shown],
    )


def made_comparison(
    shapes: Sequence[ServiceShape] = TWO,
    probes: Sequence[float] = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0),
    shown: Sequence[float] = (1.0, 2.5),
    count: int = 120,
    **changes: Any,
) -> Comparison:
    """Of so many requests a run; `changes` are fields of the Comparison."""
    workers = max(shape.prefill + shape.decode + shape.colocated for shape in shapes)
    scaled = [[rate * workers / 2 for rate in rates] for rates in (probes, shown)]
    draws_at = 2.5 * workers / 2
    measured = [made_measured(shape, *scaled, draws_at, count=count) for shape in shapes]
    made = Comparison(
        tandem_version="0.1.0",
        date="2026-11-21T10:30:00+00:00",
        command="tandem bench compare --model llama-160m --workers 2 --input-len 512 --goodput ttft:1200 tpot:45",
        machine=Machine(processor="Made-up Xeon 2.5 GHz", cores=workers, memory_gib=15.6, device="cpu"),
        model="llama-160m",
        workload={
            "num_prompts": count,
            "request_rate": None,
            "burstiness": 1.0,
            "workload": "random",
            "source": "drawn",
            "seed": 7,
            "input_tokens": 512,
            "output_tokens": 44,
            "range_ratio": 0.5,
            "prefix_tokens": 0,
        },
        objectives=dict(OBJECTIVES),
        target_attainment=TARGET,
        measured=measured,
        verdict=verdict_on(measured, TARGET, interrupted=False),
    )
    return made.model_copy(update=changes)
