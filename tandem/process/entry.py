"""What an entry point does around its imports, the first half second of its life. Imports nothing of weight itself."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

# What a shell reports for a program that Ctrl-C ended.
INTERRUPTED = 130


def end_process(code: int) -> NoReturn:
    """What is to be done at exit is done, and no more.

    The interpreter's own end would take torch apart for most of a second, and abort where a thread is still amid it.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def starting() -> Iterator[None]:
    """Around the imports: Ctrl-C ends the process at once and quietly, and gRPC's C++ core keeps its log to itself.

    What the core logs repeats, in its own words, errors that we report; GRPC_VERBOSITY brings it back.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # read when grpc is imported
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # ignored, or somebody else's: not ours to change
        return
    # Not an exception: raised amid somebody's import, it would surface as any other error or be swallowed.
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def keep_torch_out() -> None:
    """For a process that computes nothing: transformers, whose tokenizers it uses, would import torch just for being
    installed, which takes seconds and 250 MB. Whoever imports it here fails.
    """
    if "torch" not in sys.modules:
        sys.modules["torch"] = None  # type: ignore[assignment]
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no torch


def on_stop_signals(stop: Callable[[], object], again: Callable[[], object]) -> None:
    """In the running event loop: SIGTERM, SIGINT or a terminal that is gone calls `stop`, another of the first two
    `again`. A SIGHUP that is ignored, as under nohup, stays so.
    """
    import asyncio

    loop, told = asyncio.get_running_loop(), False

    def on_signal(number: int) -> None:
        nonlocal told
        if not told:
            told = True
            stop()
        elif number != signal.SIGHUP:  # a shell sends a second one
            again()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            loop.add_signal_handler(number, on_signal, number)
