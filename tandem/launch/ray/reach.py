"""Asking a head before Ray does, and reading what its core says: bounded waits, and reasons in our own words."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tandem.errors import Unavailable

REACH_S = 5.0


def check_reachable(address: str) -> None:
    """A TCP connection, bounded: Ray itself would try for much longer. Raises Unavailable."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S).close()
    except OSError as error:
        why = f"no answer within {REACH_S:g} s" if isinstance(error, TimeoutError) else error.strerror
        raise Unavailable(f"the Ray head at {address} cannot be reached: {why}") from None


@contextmanager
def kept_standard_error() -> Iterator[Callable[[], str]]:
    """What this process prints there meanwhile, a library's C++ core included, is kept and can be read."""
    sys.stderr.flush()
    ours = os.dup(2)
    with tempfile.TemporaryFile() as kept:

        def said() -> str:
            kept.seek(0)
            return kept.read().decode(errors="replace")

        os.dup2(kept.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(ours, 2)
            os.close(ours)
