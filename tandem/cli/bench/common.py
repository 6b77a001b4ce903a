"""What the load tests share: their extra, Ctrl-C that ends with a report, a bar, files checked beforehand."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from tandem.errors import ConfigError

if TYPE_CHECKING:  # numpy: only for whoever runs a load test
    from loadtest.runner import LoadRun


def need_extra(*more: str) -> None:
    """Raises ConfigError unless what load tests need is installed."""
    for module in ("aiohttp", "numpy", *more):
        try:
            import_module(module)
        except ImportError as error:
            hint = "pip install -c constraints.txt -e '.[bench]' in a checkout"
            raise ConfigError(f"load tests need {error.name}: {hint}") from None


def check_writable(path: Path) -> None:
    """Now, and not after an hour of measuring; leaves no file where there was none. Raises ConfigError."""
    new = not os.path.lexists(path)
    try:
        path.open("a").close()
        if new:
            path.unlink()
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}", field="output") from None


@contextmanager
def stopping() -> Iterator[asyncio.Event]:
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


class Bar:
    """How far a run is, on a terminal."""

    def __init__(self, console: Console, doing: str = "measuring") -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
        )
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task("starting", total=None, state="")
        self.doing = doing

    def show_run(self, run: LoadRun) -> None:
        offered = len(run.outcomes)
        state = f"{run.ended}/{run.planned} done, {offered - run.ended} under way, {run.failed} failed"
        self._progress.update(self._task, description=self.doing, total=run.planned, completed=run.ended, state=state)

    def show_stage(self, words: str) -> None:
        """What is done from now on."""
        self.doing = words
        self._progress.reset(self._task, description=words, total=None, state="")

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
