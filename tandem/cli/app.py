"""`tandem`: the command line.

Exit codes: 0 done, 1 it failed, 2 the command line or configuration is wrong, 130 Ctrl-C.
"""

from __future__ import annotations

from typing import Annotated

import typer

import tandem
from tandem.cli.bench import bench
from tandem.cli.cluster import down, scale
from tandem.cli.demo import demo
from tandem.cli.generate import generate
from tandem.cli.options import with_groups
from tandem.cli.serve import serve
from tandem.cli.status import status
from tandem.cli.worker import worker
from tandem.cli.workers import drain, roles

# Tracebacks stay plain: one that a user sees is a bug, and its text belongs into a report.
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Tandem serves language models with prefill and decode split across two pools of workers.",
)
for command in (serve, scale, down, generate, status, drain, roles, worker, demo):
    app.command()(with_groups(command))
app.add_typer(bench, name="bench")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tandem {tandem.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True)] = False,
) -> None:
    """Options that stand before a command; --version acts by itself."""
