"""`tandem bench compare`: colocated against disaggregated workers, on the same cores with the same load."""

from __future__ import annotations

import asyncio
import shlex
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from tandem.cli.bench.common import Bar, check_writable, need_extra, stopping
from tandem.cli.bench.options import ObjectiveOptions, SearchOptions, WorkloadOptions
from tandem.cli.console import make_console, reported
from tandem.cli.options import ServedOptions
from tandem.config import TandemConfig
from tandem.engine.backends.cores import usable_cores
from tandem.errors import ConfigError
from tandem.launch.cores import pin
from tandem.launch.processes import Supervisor
from tandem.process.entry import INTERRUPTED

if TYPE_CHECKING:  # numpy: only for whoever runs a load test
    from loadtest.compare.contender import Ending
    from loadtest.compare.model import Comparison, Run, ServiceShape
    from loadtest.compare.question import Question
    from loadtest.metrics import Goodput

# No service stays in use when it is stopped, so nothing is worth waiting for.
DRAIN_S = 1.0


def compare(
    objectives: ObjectiveOptions,
    load: WorkloadOptions,
    search: SearchOptions,
    served: ServedOptions,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write FILE.json and the report FILE.html.")
    ] = None,
) -> None:
    """Find the highest rate that keeps the objectives: of colocated workers, and of each split into prefill and decode.

    Every shape runs as a service of its own, with as many workers, pinned to the same cores; loads take turns. All of
    them stay in memory: shapes x workers copies of the model, on CUDA as many on a GPU as there are shapes. Ctrl-C
    gives the report so far.
    """
    with reported():
        need_extra("plotly", "jinja2")
        from loadtest.compare.comparing import NothingFound
        from loadtest.compare.table import table_of

        question = search.question(load.plan(), objectives.objectives())
        settings = _settings(served)
        files = None if output is None else _Files.of(output)
        _share_cores_evenly(question.workers)
        try:
            found, interrupted = asyncio.run(_compared(question, settings))
        except (KeyboardInterrupt, NothingFound):
            typer.echo("tandem: stopped before anything was found", err=True)
            raise typer.Exit(INTERRUPTED) from None
        console = make_console()
        console.print(table_of(found))
        for sentence in found.verdict.text:
            console.print(sentence, markup=False)
        if files is not None:
            files.write(found)
    if interrupted:
        raise typer.Exit(INTERRUPTED)


def _settings(served: ServedOptions) -> TandemConfig:
    """The same for all services; any free ports, so that one that runs already is not disturbed."""
    settings = served.settings()
    if settings.engine.threads:
        raise ConfigError("engine.threads: a comparison gives every worker its own cores", field="engine.threads")
    if settings.engine.device == "cuda" and not (settings.engine.kv_memory_mib or settings.engine.num_blocks):
        raise ConfigError(
            "the services of a comparison share the GPUs, so each worker must be told how much of one it may take: "
            "engine.kv_memory_mib or engine.num_blocks (in --config)",
            field="engine.kv_memory_mib",
        )
    return settings.model_copy(
        update={
            "router": settings.router.model_copy(update={"port": 0, "http_port": -1, "drain_timeout_s": DRAIN_S}),
            "worker": settings.worker.model_copy(update={"drain_timeout_s": DRAIN_S}),
        }
    )


def _share_cores_evenly(workers: int) -> None:
    """Leaves out the cores that are over, or one role might get more than the other."""
    cores = usable_cores()
    if len(cores) < workers:
        raise ConfigError(
            f"--workers {workers} needs as many cores, and this process may use {len(cores)}", field="workers"
        )
    pin(cores[: len(cores) - len(cores) % workers])


async def _compared(question: Question, settings: TandemConfig) -> tuple[Comparison, bool]:
    """What was found, and whether Ctrl-C ended it."""
    from loadtest.compare.comparing import Comparing

    @asynccontextmanager
    async def start(shape: ServiceShape) -> AsyncIterator[str]:
        async with Supervisor(settings_of(settings, shape), output=None) as supervisor:
            yield supervisor.address

    console = make_console(stderr=True)
    with stopping() as stop, Bar(console) as bar:
        found = await Comparing(question, start, stop, _Reporter(bar, console)).compare(
            shlex.join(["tandem", *sys.argv[1:]])
        )
        return found, stop.is_set()


def settings_of(settings: TandemConfig, shape: ServiceShape) -> TandemConfig:
    """What the service of one shape is started with."""
    pools = {"prefill": shape.prefill, "decode": shape.decode, "colocated": shape.colocated}
    return settings.model_copy(
        update={
            "serve": settings.serve.model_copy(update=pools),
            "engine": settings.engine.model_copy(update={"max_step_tokens": shape.step_tokens}),
        }
    )


class _Reporter:
    """A line for every load that has ended, above the bar of the one that runs."""

    def __init__(self, bar: Bar, console: Console) -> None:
        self._console = console
        self.report_stage = bar.show_stage
        self.report_run = bar.show_run

    def report_limits(self, goodput: Goodput) -> None:
        words = " and ".join(f"{metric} ≤ {limit_ms:g} ms" for metric, limit_ms in goodput.items())
        self._console.print(f"objectives: {words}")

    def report_ended(self, shape: ServiceShape, run: Run, ending: Ending) -> None:
        how = {"whole": "", "hopeless": ", out of reach: stopped", "cut": ", cut off"}[ending.value]
        others = run.figures.get("others_busy", 0.0)
        how += f"; lost {' and '.join(run.lost)}" if run.lost else ""
        how += f"; other programs took {others:.0%} of the cores" if others >= 0.01 else ""
        self._console.print(
            f"{shape.name}: {run.rate_rps:.2f} requests/s, {run.attainment:.0%} of {run.offered} requests met all "
            f"({run.duration_s:.0f} s{how})"
        )

    def report_failed(self, shape: ServiceShape, why: str) -> None:
        self._console.print(f"{shape.name} failed, the others go on: {why}", markup=False)


@dataclass(frozen=True)
class _Files:
    data: Path
    page: Path

    @classmethod
    def of(cls, output: Path) -> _Files:
        """Raises ConfigError when they cannot be written."""
        if not output.name:
            raise ConfigError(f"--output must name a file, not {output}", field="output")
        base = output.with_suffix("") if output.suffix in (".json", ".html") else output
        files = cls(base.with_name(base.name + ".json"), base.with_name(base.name + ".html"))
        check_writable(files.data)
        check_writable(files.page)
        return files

    def write(self, found: Comparison) -> None:
        from loadtest.compare.html import render

        self.data.write_text(found.model_dump_json(indent=1) + "\n", encoding="utf-8")
        self.page.write_text(render(found), encoding="utf-8")
        typer.echo(f"wrote {self.data} and {self.page}", err=True)
