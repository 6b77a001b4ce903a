"""`tandem bench run`: measures one service, Tandem's own or any OpenAI endpoint."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tandem.cli.bench.common import Bar, check_writable, need_extra, stopping
from tandem.cli.bench.options import ArrivalOptions, ObjectiveOptions, WorkloadOptions
from tandem.cli.console import make_console, reported
from tandem.cli.options import RouterOption
from tandem.client.request import DEFAULT_ADDRESS
from tandem.errors import ConfigError
from tandem.process import descriptors
from tandem.process.entry import INTERRUPTED

if TYPE_CHECKING:  # numpy and aiohttp: only for whoever runs a load test
    from loadtest.schedule.plan import Plan
    from loadtest.session import Measuring, Result
    from loadtest.targets.target import LoadTarget, SendOptions


@dataclass(frozen=True)
class TargetOptions:
    """Whom to ask, and what of every request."""

    router: RouterOption = DEFAULT_ADDRESS
    openai: Annotated[
        str | None, typer.Option(metavar="URL", help="Measure http://HOST:PORT, an OpenAI endpoint, not --router.")
    ] = None
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="Of the OpenAI endpoint.")] = None
    model: Annotated[str, typer.Option(help="The model to ask for, if the service has several.")] = ""
    ignore_eos: Annotated[bool, typer.Option(help="Generate every token asked for; no OpenAI field.")] = True
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="For each answer.")] = 600.0

    def sending(self) -> SendOptions:
        """Raises ConfigError."""
        from loadtest.schedule.plan import check_temperature, check_timeout
        from loadtest.targets.target import SendOptions

        temperature, timeout_s = check_temperature(self.temperature), check_timeout(self.timeout)
        return SendOptions(self.model, self.ignore_eos, temperature, timeout_s)

    def target(self, sending: SendOptions) -> LoadTarget:
        """Within the event loop that asks. Raises InvalidRequest or ConfigError for an address that is none."""
        from loadtest.targets.grpc import GrpcTarget
        from loadtest.targets.openai import OpenAITarget

        if self.openai is None:
            return GrpcTarget(self.router, sending)
        return OpenAITarget(self.openai, sending, self.api_key)


@dataclass(frozen=True)
class ReportOptions:
    """What is told of the answers."""

    percentiles: Annotated[str, typer.Option(help="To report, with commas between.")] = "50,90,95,99"
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the figures as JSON.")] = None
    save_detailed: Annotated[bool, typer.Option("--save-detailed", help="In FILE also every request.")] = False

    def check(self) -> None:
        """Raises ConfigError."""
        if self.output is not None:
            check_writable(self.output)
        elif self.save_detailed:
            raise ConfigError("--save-detailed belongs to --output FILE", field="save_detailed")

    def show(self, result: Result, percentiles: Sequence[float]) -> None:
        from loadtest.report import report

        make_console().print(report(result.figures, percentiles))
        if self.output is not None:
            figures: dict[str, Any] = result.figures | (result.details() if self.save_detailed else {})
            self.output.write_text(json.dumps(figures, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def run(
    objectives: ObjectiveOptions,
    load: WorkloadOptions,
    arrivals: ArrivalOptions,
    targets: TargetOptions,
    reports: ReportOptions,
    max_concurrency: Annotated[int | None, typer.Option(min=1, help="Requests under way at most.")] = None,
    num_warmups: Annotated[int, typer.Option(min=0, max=10_000, help="Requests before the clock starts.")] = 0,
    vocab_size: Annotated[int | None, typer.Option(help="Token ids below this; if not given: ask the service.")] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Leave longer requests out; if not given: ask the service.")
    ] = None,
) -> None:
    """Send requests when they are due, whatever the answers do, and report latencies, throughput and goodput.

    Figures have the names and the meaning of `vllm bench serve`. Ctrl-C ends the run with the report so far.
    """
    with reported():
        need_extra()
        from loadtest.schedule.plan import parse_percentiles
        from loadtest.session import Measuring, nothing_answered

        plan = load.plan(vocab_size=vocab_size, max_model_len=max_model_len, **arrivals.of_plan())
        percentiles = parse_percentiles(reports.percentiles)
        measuring = Measuring(max_concurrency, num_warmups, objectives.limits_ms(), percentiles)
        sending = targets.sending()
        reports.check()
        descriptors.raise_limit()  # an HTTP request under way is a connection
        try:
            result = asyncio.run(_measured(targets, sending, plan, measuring))
        except KeyboardInterrupt:  # the second one
            typer.echo("tandem: cancelled", err=True)
            raise typer.Exit(INTERRUPTED) from None
        reports.show(result, percentiles)
        if result.run.interrupted:
            raise typer.Exit(INTERRUPTED)
        if not result.figures["completed"]:
            raise nothing_answered(result.run.outcomes)


async def _measured(targets: TargetOptions, sending: SendOptions, plan: Plan, measuring: Measuring) -> Result:
    from loadtest.session import measure

    target = targets.target(sending)
    try:
        with stopping() as stop, Bar(make_console(stderr=True)) as bar:
            return await measure(target, plan, measuring, stop, bar.show_run)
    finally:
        await target.close()
