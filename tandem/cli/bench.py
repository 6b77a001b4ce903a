"""`tandem bench`: load tests. `tandem bench run` measures one service, Tandem's own or any OpenAI endpoint."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from tandem.cli.common import RouterOption, make_console, reported
from tandem.client.request import DEFAULT_ADDRESS
from tandem.entry import INTERRUPTED
from tandem.errors import ConfigError

if TYPE_CHECKING:  # numpy and aiohttp: only for whoever runs a load test
    from loadtest.arrivals import RampUp
    from loadtest.plan import Plan
    from loadtest.runner import Run
    from loadtest.session import Measuring, Result
    from loadtest.target import SendOptions, Target

bench = typer.Typer(no_args_is_help=True, help="Load tests: what a service delivers, and how much it takes.")


class WorkloadName(StrEnum):
    RANDOM = "random"
    MOONCAKE = "mooncake"
    AZURE = "azure"


class RampUpName(StrEnum):
    LINEAR = "linear"
    EXPONENTIAL = "exponential"


@bench.callback()
def _group() -> None:
    """Makes `run` a command of its own, also while it is the only one."""


@bench.command()
def run(
    more_goodput: Annotated[
        list[str] | None, typer.Argument(metavar="[METRIC:MS]...", help="More objectives, as after --goodput.")
    ] = None,
    router: RouterOption = DEFAULT_ADDRESS,
    openai: Annotated[
        str | None, typer.Option(metavar="URL", help="Measure this OpenAI endpoint instead, such as http://host:8000.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="Of the OpenAI endpoint.")] = None,
    model: Annotated[str, typer.Option(help="The model to ask for, if the service has several.")] = "",
    workload: Annotated[WorkloadName, typer.Option(help="Where lengths come from.")] = WorkloadName.RANDOM,
    num_prompts: Annotated[int, typer.Option(help="Requests in all; of a trace, the first ones.")] = 100,
    input_len: Annotated[int, typer.Option(help="random: mean prompt length, tokens.")] = 1024,
    output_len: Annotated[int, typer.Option(help="random: mean output length, tokens.")] = 128,
    range_ratio: Annotated[
        float, typer.Option(help="random: lengths vary by this share, up and down; 0: fixed.")
    ] = 0.0,
    prefix_len: Annotated[int, typer.Option(help="random: tokens in front that all prompts share.")] = 0,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="mooncake, azure: the trace; mooncake's is made up without it.")
    ] = None,
    scale_lengths: Annotated[float, typer.Option(help="Traces: times this, input and output.")] = 1.0,
    scale_time: Annotated[
        float, typer.Option(help="Traces: time between arrivals, times this; 2 halves the rate.")
    ] = 1,
    jitter: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Traces: arrivals up to this much later; mooncake: 3, its clock's step."),
    ] = None,
    request_rate: Annotated[
        float | None,
        typer.Option(metavar="RPS", help="Requests a second; if not given: all at once, or a trace's own times."),
    ] = None,
    burstiness: Annotated[float, typer.Option(help="Shape of the gamma distributed gaps; 1 is Poisson.")] = 1.0,
    ramp_up_strategy: Annotated[RampUpName | None, typer.Option(help="Let the rate grow; needs both rates.")] = None,
    ramp_up_start_rps: Annotated[float | None, typer.Option(help="The rate at the first request.")] = None,
    ramp_up_end_rps: Annotated[float | None, typer.Option(help="The rate at the last request.")] = None,
    max_concurrency: Annotated[int | None, typer.Option(min=1, help="Requests under way at most.")] = None,
    num_warmups: Annotated[int, typer.Option(min=0, max=10_000, help="Requests before the clock starts.")] = 0,
    seed: Annotated[int, typer.Option(help="The same seed, the same load.")] = 0,
    goodput: Annotated[
        list[str] | None, typer.Option(metavar="METRIC:MS", help="Objectives: ttft:500 tpot:50 e2el:5000.")
    ] = None,
    percentiles: Annotated[str, typer.Option(help="To report, with commas between.")] = "50,90,95,99",
    ignore_eos: Annotated[bool, typer.Option(help="Generate every token asked for; no OpenAI field.")] = True,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="For each answer.")] = 600.0,
    vocab_size: Annotated[int | None, typer.Option(help="Token ids below this; if not given: ask the service.")] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Leave longer requests out; if not given: ask the service.")
    ] = None,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the figures as JSON.")] = None,
    save_detailed: Annotated[bool, typer.Option("--save-detailed", help="In FILE also every request.")] = False,
) -> None:
    """Send requests when they are due, whatever the answers do, and report latencies, throughput and goodput.

    Figures have the names and the meaning of `vllm bench serve`. Ctrl-C ends the run with the report so far.
    """
    with reported():
        _need_extra()
        from loadtest.plan import Plan, check_timeout, parse_goodput, parse_percentiles
        from loadtest.session import Measuring
        from loadtest.target import SendOptions
        from loadtest.workloads import Lengths

        plan = Plan(
            workload=workload.value,
            num_prompts=num_prompts,
            lengths=Lengths(input_len, output_len, range_ratio, prefix_len),
            trace=trace,
            scale_lengths=scale_lengths,
            scale_time=scale_time,
            jitter_s=jitter,
            request_rate=request_rate,
            burstiness=burstiness,
            ramp_up=_ramp_up(ramp_up_strategy, ramp_up_start_rps, ramp_up_end_rps),
            seed=seed,
            vocab_size=vocab_size,
            max_model_len=max_model_len,
        )
        objectives = parse_goodput([*(goodput or ()), *(more_goodput or ())])
        measuring = Measuring(max_concurrency, num_warmups, objectives, parse_percentiles(percentiles))
        options = SendOptions(model, ignore_eos, temperature, check_timeout(timeout))
        _check_output(output, save_detailed)
        try:
            result = asyncio.run(_measured(router, openai, api_key, options, plan, measuring))
        except KeyboardInterrupt:  # the second one
            typer.echo("tandem: cancelled", err=True)
            raise typer.Exit(INTERRUPTED) from None
        _show(result, measuring, output, save_detailed)
    if result.run.interrupted:
        raise typer.Exit(INTERRUPTED)


def _need_extra() -> None:
    try:
        import aiohttp
        import numpy
    except ImportError as error:
        raise ConfigError(f"load tests need {error.name}: pip install 'tandem[bench]'") from None
    del aiohttp, numpy


def _ramp_up(strategy: RampUpName | None, start_rps: float | None, end_rps: float | None) -> RampUp | None:
    from loadtest.arrivals import RampUp

    if strategy is not None and start_rps is not None and end_rps is not None:
        return RampUp(strategy.value, start_rps, end_rps)
    if (strategy, start_rps, end_rps) != (None, None, None):
        raise ConfigError("--ramp-up-strategy, --ramp-up-start-rps and --ramp-up-end-rps go together")
    return None


def _check_output(output: Path | None, detailed: bool) -> None:
    """Now, and not after an hour of measuring."""
    if output is None and detailed:
        raise ConfigError("--save-detailed belongs to --output FILE", field="save_detailed")
    if output is not None:
        try:
            output.open("a").close()
        except OSError as error:
            raise ConfigError(f"cannot write {output}: {error.strerror}", field="output") from None


async def _measured(
    router: str, openai: str | None, api_key: str | None, options: SendOptions, plan: Plan, measuring: Measuring
) -> Result:
    from loadtest.session import measure

    target = _target(router, openai, api_key, options)
    try:
        with _stopping() as stop, _Bar(make_console(stderr=True)) as bar:
            return await measure(target, plan, measuring, stop, bar.show)
    finally:
        await target.close()


def _target(router: str, openai: str | None, api_key: str | None, options: SendOptions) -> Target:
    from loadtest.grpc_target import GrpcTarget
    from loadtest.openai_target import OpenAITarget

    return GrpcTarget(router, options) if openai is None else OpenAITarget(openai, options, api_key)


@contextmanager
def _stopping() -> Iterator[asyncio.Event]:
    """Set by the first Ctrl-C; a second one ends the process as it would any."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def first() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)

    loop.add_signal_handler(signal.SIGINT, first)
    try:
        yield stop
    finally:
        loop.remove_signal_handler(signal.SIGINT)


class _Bar:
    """How far a run is, on a terminal."""

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
        )
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task("starting", total=None, state="")

    def show(self, run: Run) -> None:
        offered = len(run.outcomes)
        state = f"{run.ended}/{run.planned} done, {offered - run.ended} under way, {run.failed} failed"
        self._progress.update(self._task, description="measuring", total=run.planned, completed=run.ended, state=state)

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def _show(result: Result, measuring: Measuring, output: Path | None, detailed: bool) -> None:
    from loadtest.report import report

    make_console().print(report(result.figures, measuring.percentiles))
    if output is not None:
        figures: dict[str, Any] = result.figures | (result.details() if detailed else {})
        output.write_text(json.dumps(figures, indent=1, allow_nan=False) + "\n", encoding="utf-8")
