"""Standard output and error that hold nobody up, be a disk full, a terminal stopped, or a reader slow or gone.

Entry points of processes that serve call `never_block` before anything else. It works on two levels. Where the system
lets it, the descriptors themselves no longer wait, so that neither does a C library that writes to them. And Python's
streams are replaced by ones that raise nothing and lose nothing without saying so.
"""

from __future__ import annotations

import atexit
import io
import os
import select
import signal
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, cast

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

# What waits in the process for its reader, bytes: some thousand lines.
BACKLOG_BYTES = 1 << 20
# Exit of a process waits so long for what its readers have not taken.
LAST_WORDS_S = 2.0
# Pause, doubling, where a terminal says that it takes more and takes nothing: a line's end needs room for two there.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.001, 0.1


class _Chunk(NamedTuple):
    data: bytes
    # Lines that are lost if it is; those that it says are lost count.
    lines: int


def say_lost(count: int) -> str:
    return f"{count} {'line was' if count == 1 else 'lines were'} lost here: this output could not be written"


class StandardStream(io.RawIOBase):
    """What is below sys.stdout and sys.stderr. Writing returns at once and never fails.

        write ──▶ written, if the descriptor takes it now
           ├────▶ backlog, if it would have to wait ──by the thread, in order──▶ written, or lost
           └────▶ lost, if it fails, or the backlog is full: counted, and told ahead of what can be written next

    A line that was written at once survives whatever end the process takes.
    """

    def __init__(self, fd: int) -> None:
        """fd: stays the caller's."""
        # Words for so many lost lines.
        self.say_lost: Callable[[int], str] = say_lost
        self._fd = fd
        self._prompt = _make_prompt(fd)
        self._backlog: deque[_Chunk] = deque()
        self._backlog_bytes = 0
        self._lost = 0
        self._ends_line = True
        # Reentrant: what is collected as garbage in here may have something to print.
        self._changed = threading.Condition(threading.RLock())
        self._thread: threading.Thread | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def write(self, data: ReadableBuffer, /) -> int:
        taken = bytes(data)
        with self._changed:
            self._take(taken, taken.count(b"\n"))
        return len(taken)

    def wait_written(self, until_s: float) -> None:
        """until_s: on the monotonic clock; then it gives up."""
        with self._changed:
            self._changed.wait_for(lambda: not self._backlog, max(0.0, until_s - time.monotonic()))

    def _take(self, data: bytes, lines: int) -> None:
        ends_line = data.endswith(b"\n")
        if self._lost:
            data, lines = self._told() + data, lines + self._lost
        self._lost = 0
        if self._prompt and not self._backlog:
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:
                pass
            except OSError:
                self._lost = lines
                return
        if self._backlog and self._backlog_bytes + len(data) > BACKLOG_BYTES:
            self._lost = lines
            return
        self._ends_line = ends_line
        if data:
            self._keep(_Chunk(data, lines))

    def _told(self) -> bytes:
        return (b"" if self._ends_line else b"\n") + f"{self.say_lost(self._lost)}\n".encode(errors="replace")

    def _keep(self, chunk: _Chunk) -> None:
        self._backlog.append(chunk)
        self._backlog_bytes += len(chunk.data)
        if self._thread is None:
            self._thread = threading.Thread(target=self._write_backlog, name="standard-stream", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _write_backlog(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._backlog))
                chunk = self._backlog[0]
            whole = self._write_patiently(chunk.data)
            with self._changed:
                self._backlog.popleft()
                self._backlog_bytes -= len(chunk.data)
                if not whole:
                    self._lost += chunk.lines
                    self._ends_line = False
                elif self._lost and not self._backlog:
                    self._take(b"", 0)  # there may be no next line to tell it with
                self._changed.notify_all()

    def _write_patiently(self, data: bytes) -> bool:
        """Whether all of it could be written."""
        ready = select.poll()
        ready.register(self._fd, select.POLLOUT)
        pause_s = FIRST_PAUSE_S
        try:
            while data:
                ready.poll()
                try:
                    data = data[os.write(self._fd, data) :]
                    pause_s = FIRST_PAUSE_S
                except BlockingIOError:
                    time.sleep(pause_s)
                    pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        except OSError:
            return False
        return True


def never_block() -> None:
    """From now on no output of this process makes it wait or fail. May be called again; what somebody else has put in
    the place of Python's streams stays.
    """
    _open_closed()
    with suppress(ValueError):  # a thread may not
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # `stty tostop` stops whoever writes in the background
    for name, fd in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__") or below(stream) is not None:
            continue
        ours = io.TextIOWrapper(
            cast(BinaryIO, StandardStream(fd)),
            encoding=getattr(stream, "encoding", "utf-8"),
            errors="backslashreplace",
            line_buffering=True,
        )
        setattr(sys, name, ours)
        setattr(sys, f"__{name}__", ours)
    atexit.unregister(say_last_words)
    atexit.register(say_last_words)


def below(stream: object) -> StandardStream | None:
    """What is below a stream of Python's, if it is ours."""
    buffer = getattr(stream, "buffer", None)
    return buffer if isinstance(buffer, StandardStream) else None


def say_last_words() -> None:
    """Gives what has been printed a moment to reach its readers; done at exit. For ends that skip what is."""
    until_s = time.monotonic() + LAST_WORDS_S
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is not None and (ours := below(stream)) is not None:
            stream.flush()
            ours.wait_written(until_s)


def _open_closed() -> None:
    """A descriptor that was closed for us (`2>&-`) leads nowhere: the next socket would get its number otherwise, and
    what a library prints.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, this one


def _make_prompt(fd: int) -> bool:
    """Whether writing to it returns at once, now.

    A pipe or a terminal is opened anew for that: O_NONBLOCK belongs to the open file, which is the shell's, too. A
    socket cannot be, nor what belongs to somebody else.
    """
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISFIFO(mode) or os.isatty(fd)):
        return not stat.S_ISSOCK(mode)
    try:
        anew = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return False
    os.dup2(anew, fd)
    os.close(anew)
    return True
