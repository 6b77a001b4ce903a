"""A child that must not outlive its parent: it holds the read end of a pipe whose other end only the parent holds.

However the parent ends, SIGKILL included, the pipe reads end-of-file. That is portable, and it leaves no gap between
the start of the child and the moment it looks, as polling the parent's pid would.
"""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress

# An orphan may take this long to end as on SIGTERM; then it is ended the hard way.
ORPHAN_GRACE_S = 5.0


def exit_with_parent(pipe_fd: int = 0, grace_s: float = ORPHAN_GRACE_S) -> None:
    """From now on this process ends when `pipe_fd` (standard input, unless said otherwise) reads end-of-file."""
    threading.Thread(target=_watch, args=(pipe_fd, grace_s), name="exit-with-parent", daemon=True).start()


def _watch(pipe_fd: int, grace_s: float) -> None:
    with suppress(OSError):  # a reset is an end too
        while os.read(pipe_fd, 4096):
            pass  # nobody writes; a byte would not mean the end
    hard_end = threading.Timer(grace_s, os._exit, args=(1,))
    hard_end.daemon = True
    hard_end.start()
    os.kill(os.getpid(), signal.SIGTERM)
