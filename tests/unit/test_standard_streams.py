"""Outputs that cannot be written: nobody waits, nothing fails, and what is lost is counted to the line."""

from __future__ import annotations

import errno
import os
import pty
import re
import select
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tandem.process.standard_streams import BACKLOG_BYTES, StandardStream

ROOT = Path(__file__).resolve().parents[2]
LINES, BOUND_S = 30_000, 20.0
LINE = b"line %06d of a log that nobody reads for a while, for all that we know\n"
PRELUDE = "from tandem.process.standard_streams import never_block; never_block(); import os, sys\n"
LOST = re.compile(rb"(\d+) lines? (?:was|were) lost here: this output could not be written\r?\n")


class Reader:
    """The far end, which reads when it is told to."""

    def __init__(self, fd: int) -> None:
        self.fd, self.got = fd, b""

    def read_until(self, end: bytes) -> bytes:
        limit = time.monotonic() + BOUND_S
        while not self.got.rstrip(b"\r\n").endswith(end):
            assert select.select([self.fd], [], [], limit - time.monotonic())[0], self.got[-200:]
            self.got += os.read(self.fd, 1 << 16)
        return self.got.replace(b"\r\n", b"\n")


def pipe() -> tuple[int, int, Callable[[], None]]:
    ours, theirs = os.pipe()
    return ours, theirs, lambda: None


def sockets() -> tuple[int, int, Callable[[], None]]:
    """It cannot be opened anew: a thread waits for it."""
    ours, theirs = socket.socketpair()
    return ours.detach(), theirs.detach(), lambda: None


def stopped_terminal() -> tuple[int, int, Callable[[], None]]:
    """As by Ctrl-S."""
    ours, theirs = pty.openpty()
    termios.tcflow(theirs, termios.TCOOFF)
    return ours, theirs, lambda: termios.tcflow(theirs, termios.TCOON)


def unread_terminal() -> tuple[int, int, Callable[[], None]]:
    return *pty.openpty(), lambda: None


@pytest.fixture(params=[pipe, sockets, stopped_terminal, unread_terminal])
def blocked(request: pytest.FixtureRequest) -> Iterator[tuple[Reader, int, Callable[[], None]]]:
    ours, theirs, let = request.param()
    yield Reader(ours), theirs, let
    for fd in (ours, theirs):
        with suppress(OSError):
            os.close(fd)


def test_a_reader_that_pauses_gets_all_but_what_it_is_told_of(
    blocked: tuple[Reader, int, Callable[[], None]],
) -> None:
    reader, fd, let = blocked
    stream = StandardStream(fd)
    for number in range(LINES):
        assert stream.write(LINE % number) == len(LINE % number)
    let()
    reader.read_until(b"could not be written")  # it is told of the loss though no line follows
    stream.write(b"the last\n")
    text = reader.read_until(b"the last")
    # A terminal that nobody reads takes a little more now and then: then lines are lost in more places than one.
    position = 0
    for line in text.removesuffix(b"the last\n").splitlines(keepends=True):
        lost = LOST.fullmatch(line)
        assert lost or line == LINE % position
        position += int(lost[1]) if lost else 1
    assert position == LINES


def test_a_reader_that_is_slow_misses_nothing_that_fits() -> None:
    ours, theirs = os.pipe()
    stream, reader = StandardStream(theirs), Reader(ours)
    lines = [LINE % number for number in range(BACKLOG_BYTES // len(LINE % 0))]
    for line in lines:
        stream.write(line)
    stream.write(b"the last\n")
    assert reader.read_until(b"the last") == b"".join(lines) + b"the last\n"


@pytest.mark.parametrize("kind", ["disk full", "reader gone", "terminal gone"])
def test_what_cannot_be_written_at_all_is_counted(kind: str, tmp_path: Path) -> None:
    if kind == "disk full":
        fd = os.open("/dev/full", os.O_WRONLY)
    else:
        ours, fd = os.pipe() if kind == "reader gone" else pty.openpty()
        os.close(ours)
    with pytest.raises(OSError) as failed:
        os.write(fd, b"x")
    assert failed.value.errno in (errno.ENOSPC, errno.EPIPE, errno.EIO)
    stream = StandardStream(fd)
    for number in range(100):
        stream.write(LINE % number)
    stream.wait_written(time.monotonic() + BOUND_S)
    path = tmp_path / "log"
    mends = os.open(path, os.O_WRONLY | os.O_CREAT)  # space again
    os.dup2(mends, fd)
    stream.write(b"the last\n")
    stream.wait_written(time.monotonic() + BOUND_S)
    said = path.read_bytes()
    assert [int(number) for number in LOST.findall(said)] == [100]
    assert said.endswith(b"\nthe last\n")
    os.close(mends)
    os.close(fd)


def run(code: str, **how: int | None) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", PRELUDE + code], cwd=ROOT, **how)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize("blocked", [pipe, stopped_terminal, unread_terminal], indirect=True)
def test_a_library_that_writes_does_not_wait_either(blocked: tuple[Reader, int, Callable[[], None]]) -> None:
    _, fd, _ = blocked
    code = """
refused = 0
for _ in range(1000):
    try: os.write(2, b"x" * 1000)
    except BlockingIOError: refused += 1
os._exit(7 if refused > 100 else 1)
"""
    with run(code, stderr=fd) as process:
        assert process.wait(BOUND_S) == 7
    assert os.get_blocking(fd), "the shell's own descriptor is as it was"


def test_a_process_ends_though_its_last_words_find_no_reader() -> None:
    ours, theirs = os.pipe()
    code = "print('x' * 300_000); print('y' * 300_000, file=sys.stderr); raise ValueError('the end')"
    with run(code, stdout=theirs, stderr=theirs) as process:
        assert process.wait(BOUND_S) == 1
    os.close(theirs)
    with open(ours, "rb") as rest:
        assert len(rest.read()) < 300_000, "nobody read, and it waited for nobody"


def test_last_words_reach_a_reader_that_is_late() -> None:
    ours, theirs = os.pipe()
    code = "print('x' * 300_000, file=sys.stderr); raise ValueError('the end')"
    with run(code, stderr=theirs) as process:
        os.close(theirs)
        got: list[bytes] = []
        with open(ours, "rb") as rest:
            late = threading.Timer(0.3, lambda: got.append(rest.read()))
            late.start()
            assert process.wait(BOUND_S) == 1
            late.join()
    assert got[0].count(b"x") >= 300_000
    assert got[0].endswith(b"ValueError: the end\n")


def test_descriptors_that_were_closed_lead_nowhere() -> None:
    code = """
with open(os.devnull) as file:
    assert file.fileno() > 2, file.fileno()
print("to nobody"); print("to nobody", file=sys.stderr); os.write(2, b"to nobody")
os._exit(7)
"""
    command = [sys.executable, "-c", PRELUDE + code]
    shell = subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command], cwd=ROOT, timeout=BOUND_S)
    assert shell.returncode == 7
