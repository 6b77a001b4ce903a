"""The `tandem` command as a process; its commands are in tandem/cli/app.py."""

from __future__ import annotations

import os
import sys

from tandem.entry import starting


def main() -> None:
    with starting():
        from tandem.cli.app import app
    try:
        app()
    except OSError as error:
        if not _stdout_fails():
            raise
        _drop_stdout()
        print(f"tandem: cannot write to standard output: {error.strerror}", file=sys.stderr)
        sys.exit(1)


def _stdout_fails() -> bool:
    """Whether it does now: unbuffered, it keeps nothing that a flush could fail on."""
    try:
        sys.stdout.write("\n")
        sys.stdout.flush()
    except OSError:
        return True
    return False


def _drop_stdout() -> None:
    """Python flushes once more on its way out, and would report the same failure in its own way."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
