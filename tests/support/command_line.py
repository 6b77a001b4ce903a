"""`tandem COMMAND` for tests: in this process, or on a terminal of its own."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner, Result

from tandem.cli.app import app

# Where no router listens.
NOBODY = "127.0.0.1:1"


def tandem(*args: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, list(args), input=stdin)


def one_line(result: Result) -> str:
    """What a failed command said: one line, no traceback."""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    return str(lines[0])


def on_a_new_terminal(*args: str) -> list[str]:
    """What a command prints, by lines. A new terminal is 0 columns wide, like that of `ray exec`."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "tandem.cli.main", *args]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=theirs, cwd=Path(__file__).parents[2]) as ran:
        assert ran.wait(timeout=20) == 0
    os.close(theirs)
    with open(ours, "rb", buffering=0) as screen:
        return (screen.read(1 << 16) or b"").decode().splitlines()
