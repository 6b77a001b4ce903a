"""`tandem bench`: load tests. `run` measures one service, `compare` colocated against disaggregated workers."""

from __future__ import annotations

import typer

from tandem.cli.bench.compare import compare
from tandem.cli.bench.run import run
from tandem.cli.options import with_groups

bench = typer.Typer(no_args_is_help=True, help="Load tests: what a service delivers, and how much it takes.")
for command in (run, compare):
    bench.command()(with_groups(command))
