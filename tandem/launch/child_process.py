"""One child process: started, its output read line by line, ended by pid."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO

from tandem.process.standard_streams import say_lost

# (name of the child, one line of its output)
Output = Callable[[str, str], None]

# Longer lines are passed on in pieces, and so many last lines are kept for an error report.
MAX_LINE_BYTES, TAIL_LINES = 1 << 14, 20
STREAM_BYTES = 1 << 16
READY = "ready "
# How our processes begin the line that says why they cannot go on.
ERROR = "error: "
LAST_WORDS_S = 2.0


@dataclass(frozen=True)
class ProcessSpec:
    """What to run: `python -m module args...`."""

    name: str
    module: str
    args: Sequence[str]
    # Added to what all children get.
    environment: Mapping[str, str] = field(default_factory=dict)


class Backoff:
    """How long to wait before the next restart: 0.5 s, doubling to 30 s, from the start again after a stable minute."""

    FIRST_S, LIMIT_S, STABLE_S = 0.5, 30.0, 60.0

    def __init__(self) -> None:
        self._next_s = self.FIRST_S

    def after(self, lived_s: float) -> float:
        """Seconds to wait, given how long the process lived this time."""
        if lived_s >= self.STABLE_S:
            self._next_s = self.FIRST_S
        delay, self._next_s = self._next_s, min(self._next_s * 2, self.LIMIT_S)
        return delay


class _Protocol(asyncio.subprocess.SubprocessStreamProtocol):
    """Says when the process is gone. asyncio's own wait also waits for its pipes, which a grandchild may hold open."""

    def __init__(self) -> None:
        super().__init__(STREAM_BYTES, asyncio.get_running_loop())
        self.exited = asyncio.Event()

    def process_exited(self) -> None:
        super().process_exited()
        self.exited.set()


class ChildProcess:
    """A running child. It ends with this process, whatever happens to this process (tandem/launch/parent.py).

    All that it prints goes to `output`, save two lines: the one that says it is ready, and its very last if that says
    why it failed; `exit_report` has that one, and nobody reads it twice. What an `output` that raises OSError does not
    take is lost, and counted.
    """

    def __init__(
        self, spec: ProcessSpec, transport: asyncio.SubprocessTransport, protocol: _Protocol, output: Output | None
    ) -> None:
        self.spec = spec
        self._transport = transport
        self._protocol = protocol
        self._process = asyncio.subprocess.Process(transport, protocol, asyncio.get_running_loop())
        self._output = output
        self._started_s = time.monotonic()
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        # What its last line says is wrong, if it does.
        self.error = ""
        self._reported = False
        # Lines that `output` did not take.
        self._lost = 0
        # The address in the child's "ready HOST:PORT" line; empty if its output ended without one.
        self.ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._pump = asyncio.create_task(self._read_output())

    @classmethod
    async def start(
        cls,
        spec: ProcessSpec,
        output: Output | None,
        environment: Mapping[str, str] | None = None,
        config: str | None = None,
    ) -> ChildProcess:
        """`config` becomes the child's `--config`. Raises OSError when the system has no room for a process."""
        with _nameless_file() as file:
            file.write((config or "").encode())
            file.seek(0)
            transport, protocol = await asyncio.get_running_loop().subprocess_exec(
                _Protocol,
                sys.executable,
                "-u",  # its last words must not be lost in a buffer
                *_path_flags(),
                "-m",
                "tandem.launch.child",
                spec.module,
                *spec.args,
                *([] if config is None else ["--config", f"/dev/fd/{file.fileno()}"]),
                pass_fds=[file.fileno()],
                stdin=asyncio.subprocess.PIPE,  # nothing is written: the child exits when it closes
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env={**os.environ, **(environment or {}), **spec.environment},
                start_new_session=True,  # Ctrl-C reaches the supervisor alone, which ends the children in order
            )
        return cls(spec, transport, protocol, output)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    @property
    def lived_s(self) -> float:
        return time.monotonic() - self._started_s

    async def wait(self) -> int:
        """The exit code, once the process is gone and its output is read."""
        await self._protocol.exited.wait()
        await asyncio.wait({self._pump}, timeout=LAST_WORDS_S)
        self._pump.cancel()
        self._transport.close()
        code = self._process.returncode
        assert code is not None
        return code

    def signal(self, number: signal.Signals) -> None:
        if self._process.returncode is None:
            with suppress(ProcessLookupError):  # gone, and not reaped yet
                self._process.send_signal(number)

    def exit_report(self) -> str:
        """How it ended and why, for an error message; its last lines if they are all there is, and nobody saw them."""
        ended = f"{self.spec.name} {describe_exit(self._process.returncode)}"
        if self.error:
            self._reported = True
            return f"{ended}: {self.error}"
        if not self._tail:
            return f"{ended} and said nothing"
        if self._output is not None:
            return f"{ended}; what it said last is above"
        return f"{ended}; its last lines:" + "".join(f"\n    {line}" for line in self._tail)

    def pass_on_last_words(self) -> None:
        """The error that it ended with, when nobody has reported it."""
        if self.error and not self._reported:
            self._pass_on(ERROR + self.error)
            self._reported = True

    async def _read_output(self) -> None:
        assert self._process.stdout is not None
        rest = b""
        while data := await self._process.stdout.read(1 << 16):
            *lines, rest = (rest + data).split(b"\n")
            if len(rest) > MAX_LINE_BYTES:
                lines, rest = [*lines, rest], b""
            for line in lines:
                self._take(line)
        if rest:
            self._take(rest)
        if not self.ready.done():
            self.ready.set_result("")

    def _take(self, raw: bytes) -> None:
        line = raw.decode("utf-8", "replace").rstrip("\r")
        if line.startswith(READY) and not self.ready.done():
            self.ready.set_result(line.removeprefix(READY).strip())
            return
        if self.error:
            self._pass_on(ERROR + self.error)  # it was not the last
        self.error = line.removeprefix(ERROR) if line.startswith(ERROR) else ""
        if not self.error:
            self._pass_on(line)

    def _pass_on(self, line: str) -> None:
        self._tail.append(line)
        if self._output is None:
            return
        try:
            if self._lost:
                self._output(self.spec.name, say_lost(self._lost))
                self._lost = 0
            self._output(self.spec.name, line)
        except OSError:
            self._lost += 1


def _nameless_file() -> IO[bytes]:
    """Open here and in the child only: however we end, nothing of it stays behind. In memory, where the system can: a
    child is started again on a full disk, too.
    """
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("tandem"), "w+b")
    return tempfile.TemporaryFile()


def describe_exit(code: int | None) -> str:
    if code is None:
        return "is running"
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"exited with code {code}"


def _path_flags() -> list[str]:
    """A child imports from where we do: the working directory only if it is on our own path.

    `-m` alone would put it first, and a stranger's router.py there would be run instead of ours.
    """
    return [] if {"", os.getcwd()} & set(sys.path) else ["-P"]
