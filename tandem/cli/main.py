"""The `tandem` command as a process; its commands are in tandem/cli/app.py."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from typing import TextIO

from tandem.process.entry import starting

# What writing to a full disk, a lost terminal or a pipe that nobody reads ends in.
_OUTPUT_FAILS = {errno.ENOSPC, errno.EIO, errno.EPIPE, errno.EBADF, errno.EDQUOT}


def main() -> None:
    _open_closed_ones()
    with starting():
        from tandem.cli.app import app
    try:
        app()
    except OSError as error:
        if error.errno not in _OUTPUT_FAILS:
            raise
        with suppress(OSError):
            sys.stdout.flush()
        _drop(sys.stdout)
        # When it is standard error that fails, nobody can be told.
        with suppress(OSError):
            print(f"tandem: cannot write the output: {error.strerror}", file=sys.stderr, flush=True)
        _drop(sys.stderr)
        sys.exit(1)


def _open_closed_ones() -> None:
    """Python has no object for a stream that was closed for us (`>&-`): it becomes one that nothing comes from."""
    for name, flags in (("stdin", os.O_RDONLY), ("stdout", os.O_WRONLY), ("stderr", os.O_WRONLY)):
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, os.fdopen(os.open(os.devnull, flags), mode, encoding="utf-8"))


def _drop(stream: TextIO) -> None:
    """Python flushes once more on its way out, and would report the same failure in its own way."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    main()
