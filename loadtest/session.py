"""One whole measurement: ask what is served, warm up, run the schedule, sum up."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from loadtest.metrics import Goodput, Outcome, details, summarize
from loadtest.runner import Arrival, LoadRun, Runner, Watch
from loadtest.schedule.plan import Plan, Schedule
from loadtest.schedule.workloads import LoadRequest
from loadtest.targets.target import LoadTarget, Served
from tandem.errors import TandemError, Unavailable

DEFAULT_PERCENTILES = (50.0, 90.0, 95.0, 99.0)


@dataclass(frozen=True)
class Measuring:
    """How a plan is carried out."""

    max_concurrency: int | None = None
    # Requests before the clock starts.
    num_warmups: int = 0
    goodput: Goodput = field(default_factory=dict)
    percentiles: Sequence[float] = DEFAULT_PERCENTILES


@dataclass(frozen=True)
class Result:
    served: Served
    schedule: Schedule
    run: LoadRun
    # The keys of `vllm bench serve`, and ours.
    figures: dict[str, Any]

    def details(self) -> dict[str, list[Any]]:
        """What became of every request."""
        return details(self.run.outcomes)


async def measure(
    target: LoadTarget, plan: Plan, measuring: Measuring, stop: asyncio.Event, watch: Watch | None = None
) -> Result:
    """Until the schedule is done or `stop` is set. Raises TandemError when it cannot begin."""
    served = await target.describe()
    schedule = plan.schedule(served)
    await warm_up(target, schedule.warm_up(measuring.num_warmups), stop, measuring.max_concurrency)
    run = await Runner(target, schedule.arrivals, measuring.max_concurrency, watch).send_all(stop)
    return Result(served, schedule, run, figures(target, plan, measuring, served, schedule, run))


async def warm_up(
    target: LoadTarget, requests: Sequence[LoadRequest], stop: asyncio.Event, max_concurrency: int | None = None
) -> None:
    """All at once, as many as may be. Raises Unavailable if none of them was answered: so would be no other."""
    run = await Runner(target, [Arrival(0.0, request) for request in requests], max_concurrency).send_all(stop)
    if requests and run.failed == len(requests) and not run.interrupted:
        raise nothing_answered(run.outcomes, "warm-up request")


def nothing_answered(outcomes: Sequence[Outcome], kind: str = "request") -> TandemError:
    first = outcomes[0]
    return Unavailable(f"no {kind} was answered; the first ended in {first.failure}: {first.error}")


def figures(
    target: LoadTarget, plan: Plan, measuring: Measuring, served: Served, schedule: Schedule, run: LoadRun
) -> dict[str, Any]:
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "backend": target.backend,
        "model_id": served.model,
        **plan.as_json(),
        "max_concurrency": measuring.max_concurrency,
        "goodput": dict(measuring.goodput),
        "left_out": schedule.left_out,
        "interrupted": run.interrupted,
        "not_offered": run.planned - len(run.outcomes),
        **summarize(run.outcomes, run.duration_s, measuring.percentiles, measuring.goodput),
    }
