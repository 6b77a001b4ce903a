"""Options of the load tests, in groups (tandem/cli/options.py)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tandem.errors import ConfigError

if TYPE_CHECKING:  # numpy: only for whoever runs a load test
    from loadtest.compare.question import Question
    from loadtest.metrics import Goodput
    from loadtest.objectives import Objectives
    from loadtest.schedule.arrivals import RampUp
    from loadtest.schedule.plan import Plan


class WorkloadName(StrEnum):
    RANDOM = "random"
    MOONCAKE = "mooncake"
    AZURE = "azure"


class RampUpName(StrEnum):
    LINEAR = "linear"
    EXPONENTIAL = "exponential"


@dataclass(frozen=True)
class WorkloadOptions:
    """What requests ask, and how evenly they come."""

    workload: Annotated[WorkloadName, typer.Option(help="Where lengths come from.")] = WorkloadName.RANDOM
    num_prompts: Annotated[int, typer.Option(help="Requests in all; of a trace, the first ones.")] = 100
    input_len: Annotated[int, typer.Option(help="random: mean prompt length, tokens.")] = 1024
    output_len: Annotated[int, typer.Option(help="random: mean output length, tokens.")] = 128
    range_ratio: Annotated[float, typer.Option(help="random: lengths vary by this share, up and down; 0: fixed.")] = 0.0
    prefix_len: Annotated[int, typer.Option(help="random: tokens in front that all prompts share.")] = 0
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="mooncake, azure: the trace; mooncake's is made up without it.")
    ] = None
    scale_lengths: Annotated[float, typer.Option(help="Traces: times this, input and output.")] = 1.0
    burstiness: Annotated[float, typer.Option(help="Shape of the gamma distributed gaps; 1 is Poisson.")] = 1.0
    seed: Annotated[int, typer.Option(help="The same seed, the same load.")] = 0

    def plan(self, **more: Any) -> Plan:
        """Raises ConfigError for what makes no sense."""
        from loadtest.schedule.plan import Plan
        from loadtest.schedule.workloads import Lengths

        return Plan(
            workload=self.workload.value,
            num_prompts=self.num_prompts,
            lengths=Lengths(self.input_len, self.output_len, self.range_ratio, self.prefix_len),
            trace=self.trace,
            scale_lengths=self.scale_lengths,
            burstiness=self.burstiness,
            seed=self.seed,
            **more,
        )


@dataclass(frozen=True)
class ArrivalOptions:
    """When requests come, of one run: a rate, a ramp, or a trace's own times."""

    scale_time: Annotated[float, typer.Option(help="Traces: time between arrivals, times this; 2 halves the rate.")] = 1
    jitter: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Traces: arrivals up to this much later; mooncake: 3, its clock's step."),
    ] = None
    request_rate: Annotated[
        float | None,
        typer.Option(metavar="RPS", help="Requests a second; if not given: all at once, or a trace's own times."),
    ] = None
    ramp_up_strategy: Annotated[RampUpName | None, typer.Option(help="Let the rate grow; needs both rates.")] = None
    ramp_up_start_rps: Annotated[float | None, typer.Option(help="The rate at the first request.")] = None
    ramp_up_end_rps: Annotated[float | None, typer.Option(help="The rate at the last request.")] = None

    def of_plan(self) -> dict[str, Any]:
        """The plan's fields. Raises ConfigError for half a ramp."""
        return {
            "scale_time": self.scale_time,
            "jitter_s": self.jitter,
            "request_rate": self.request_rate,
            "ramp_up": self._ramp_up(),
        }

    def _ramp_up(self) -> RampUp | None:
        from loadtest.schedule.arrivals import RampUp

        strategy, start_rps, end_rps = self.ramp_up_strategy, self.ramp_up_start_rps, self.ramp_up_end_rps
        if strategy is not None and start_rps is not None and end_rps is not None:
            return RampUp(strategy.value, start_rps, end_rps)
        if (strategy, start_rps, end_rps) != (None, None, None):
            raise ConfigError("--ramp-up-strategy, --ramp-up-start-rps and --ramp-up-end-rps go together")
        return None


GOODPUT_HELP = "Objectives: ttft:500 tpot:50 e2el:5000; in a comparison also times what an answer takes alone: ttft:4x."


@dataclass(frozen=True)
class ObjectiveOptions:
    """What an answer may take; all words behind `--goodput` count, also those that the shell passes as arguments."""

    more_goodput: Annotated[
        list[str] | None, typer.Argument(metavar="[METRIC:LIMIT]...", help="More objectives, as after --goodput.")
    ] = None
    goodput: Annotated[list[str] | None, typer.Option(metavar="METRIC:LIMIT", help=GOODPUT_HELP)] = None

    def objectives(self) -> Objectives:
        """Raises ConfigError."""
        from loadtest.objectives import parse_goodput

        return parse_goodput([*(self.goodput or ()), *(self.more_goodput or ())])

    def limits_ms(self) -> Goodput:
        """Where nobody measures what an answer takes alone. Raises ConfigError."""
        objectives = self.objectives()
        if objectives.times_alone:
            raise ConfigError(
                "--goodput in times what an answer takes alone is for `tandem bench compare`, which measures that; "
                "say milliseconds, such as ttft:500",
                field="goodput",
            )
        return objectives.limits_ms


@dataclass(frozen=True)
class SearchOptions:
    """Which shapes, and how exactly their highest rates are found."""

    workers: Annotated[int, typer.Option(help="Workers of each shape; they share the cores evenly.")] = 2
    step_tokens: Annotated[
        str,
        typer.Option(metavar="N,N,...", help="Step budgets to try for colocated workers; split ones get the largest."),
    ] = "32,128,512"
    attainment: Annotated[float, typer.Option(help="Share of offered requests that must meet every objective.")] = 0.9
    min_seconds: Annotated[
        float, typer.Option(metavar="SECONDS", help="More prompts at high rates, until a load lasts so long.")
    ] = 30.0
    resolution: Annotated[float, typer.Option(help="Of the highest rates; 0.1: to 10 %.")] = 0.1
    draws: Annotated[
        int, typer.Option(help="Draws of arrivals that decide; fewer than 5 say what happens, but give no verdict.")
    ] = 5
    start_rate: Annotated[
        float | None, typer.Option(metavar="RPS", help="The first rate to try; if not given: what prefills one by one.")
    ] = None
    time_limit: Annotated[float | None, typer.Option(metavar="SECONDS", help="Of all loads together.")] = None
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="For each answer.")] = 600.0

    def question(self, plan: Plan, objectives: Objectives) -> Question:
        """Raises ConfigError for what makes no sense."""
        from loadtest.compare.question import Question, parse_step_tokens

        return Question(
            plan=plan,
            objectives=objectives,
            workers=self.workers,
            step_tokens=parse_step_tokens(self.step_tokens),
            target=self.attainment,
            min_seconds=self.min_seconds,
            resolution=self.resolution,
            draws=self.draws,
            start_rps=self.start_rate,
            time_limit_s=self.time_limit,
            timeout_s=self.timeout,
        )
