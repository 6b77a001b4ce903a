"""What commands show: errors as one line, text that is safe on a terminal, amounts for people."""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

from tandem.client import ServiceStatus
from tandem.errors import ConfigError, InvalidRequest, ModelNotFound, TandemError
from tandem.process import logs

log = logging.getLogger(__name__)


# A pipe or a file has no width, and some terminals tell none: lines are as long as they are.
ENDLESS = 100_000


def make_console(stderr: bool = False) -> Console:
    console = Console(stderr=stderr, highlight=False)
    try:  # the terminal of `ray exec` is 0 columns wide: rich would take it for 80
        has_width = console.is_terminal and os.get_terminal_size(console.file.fileno()).columns > 0
    except OSError:
        has_width = False
    return console if has_width else Console(stderr=stderr, highlight=False, width=ENDLESS, force_terminal=False)


_OF_THE_USER = (ConfigError, InvalidRequest, ModelNotFound)


@contextmanager
def reported() -> Iterator[None]:
    """A TandemError ends the command with one line on stderr: code 2 for what the user asked for, 1 for the rest."""
    try:
        yield
    except TandemError as error:
        if logs.in_json():
            log.error("%s%s", error.message, _hint(error))
        else:
            typer.echo(f"tandem: {error.message}{_hint(error)}", err=True)
        raise typer.Exit(2 if isinstance(error, _OF_THE_USER) else 1) from None


def _hint(error: TandemError) -> str:
    if error.retry_after_ms is None:
        return ""
    return f" (try again in {math.ceil(error.retry_after_ms / 1000)} s)"


def ready_line(address: str, status: ServiceStatus) -> str:
    models = ", ".join(model.name for model in status.models)
    kinds = Counter("colocated" if len(worker.roles) > 1 else "+".join(worker.roles) for worker in status.workers)
    pools = " + ".join(f"{kinds[kind]} {kind}" for kind in ("prefill", "decode", "colocated") if kinds[kind])
    door = f"; OpenAI API at {openai_url(address, status.http_port)}" if status.http_port else ""
    return f"ready at {address}: model {models}, {pools}{door}"


def openai_url(router: str, http_port: int) -> str:
    """router: its host:port."""
    return f"http://{router.rpartition(':')[0]}:{http_port}/v1"


def printable(text: str) -> str:
    """Without control characters: what a model says must not move the cursor or set a title."""
    return "".join(char for char in text if char in "\n\t" or (char >= " " and not "\x7f" <= char <= "\x9f"))


def human_bytes(count: float) -> str:
    """'812 B', '1.5 KiB', '3.0 MiB'."""
    if count < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if count < 1024:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} TiB"
