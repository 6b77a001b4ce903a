"""Processes that begin as copies of one that has imported everything: a worker's imports take four seconds of a core.

    forked.py FD MODULE...      imports the modules, then forks for each command that comes over the socket FD

What a copy runs is `python -m MODULE ARGUMENT...` in all else: the entry point's own file as `__main__`, an environment
and output of its own, the interpreter's own end.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from tandem.process.entry import keep_torch_out

ROOT = Path(__file__).resolve().parents[2]
_MAX_COMMAND_BYTES = 1 << 18
# Where numba's cache is cold, the kernels take most of a minute.
_START_S = 120.0

_TOKENIZERS = ("transformers.models.auto.tokenization_auto",)
_ROUTER = ("router.app", "router.doors.http.door", *_TOKENIZERS)
# The kernels' modules compile when they are imported, which is late in a worker's life.
_WORKER = ("tandem.cli.app", "tandem.launch.worker", "prefill_worker.service", "decode_worker.service", *_TOKENIZERS)
_KERNELS = (
    "tandem.engine.backends.cpu.fusion",
    "tandem.engine.backends.cpu.kernels.decode",
    "tandem.engine.backends.cpu.kernels.prefill",
)


class Forked:
    """One copy, in the words of subprocess.Popen; stderr goes where stdout does."""

    def __init__(self, *command: str) -> None:
        """command: what would follow `python -m`."""
        self.returncode: int | None = None
        reading, writing = os.pipe()
        self._status, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        message = json.dumps({"command": command, "environment": {**os.environ, "PYTHONUNBUFFERED": "1"}}).encode()
        assert len(message) <= _MAX_COMMAND_BYTES
        socket.send_fds(
            _template(_ROUTER if command[0] == "router" else _WORKER + _KERNELS), [message], [writing, theirs.fileno()]
        )
        os.close(writing)
        theirs.close()
        self.stdout = os.fdopen(reading, encoding="utf-8")
        self.pid = self._told(_START_S)

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout_s: float | None = None) -> int:
        if self.returncode is None:
            self.returncode = self._told(timeout_s)
            self._status.close()
        return self.returncode

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(self.pid, signum)

    def _told(self, timeout_s: float | None) -> int:
        """What the template says next: the pid, and at the end the exit code."""
        self._status.settimeout(timeout_s)
        try:
            said = self._status.recv(64)
        except (BlockingIOError, TimeoutError):
            raise subprocess.TimeoutExpired("a forked process", timeout_s or 0) from None
        assert said, "the process that others are forked from is gone"
        return int(said)


@cache
def _template(modules: tuple[str, ...]) -> socket.socket:
    """The control socket of one that has imported these; it ends with this process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = subprocess.Popen(
        [sys.executable, __file__, str(theirs.fileno()), *modules],
        cwd=ROOT,
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        # numpy's threads would not come along.
        env={**os.environ, "PYTHONUNBUFFERED": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    theirs.close()

    def end() -> None:
        ours.close()
        process.wait(10)

    atexit.register(end)
    return ours


class _Template:
    """Forks for every command, and tells of every copy's pid and end."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        # By a pidfd: its pid, and whom to tell.
        self._living: dict[int, tuple[int, socket.socket]] = {}

    def next_command(self) -> dict[str, Any] | None:
        """Returns in every copy, with what it is to run; in the template when nobody can command it any more."""
        while True:
            for ready in select.select([self._control, *self._living], [], [])[0]:
                if ready is not self._control:
                    self._tell_end(ready)
                    continue
                message, fds, _, _ = socket.recv_fds(self._control, _MAX_COMMAND_BYTES, 2)
                if not message:
                    return None
                if self._fork(*fds):
                    command: dict[str, Any] = json.loads(message)
                    return command

    def _fork(self, output: int, status: int) -> bool:
        """Whether this is the copy."""
        told = socket.socket(fileno=status)
        pid = os.fork()
        if pid == 0:
            self._become_copy(output, told)
            return True
        os.close(output)
        told.send(str(pid).encode())
        self._living[os.pidfd_open(pid)] = pid, told
        return False

    def _tell_end(self, pidfd: int) -> None:
        pid, told = self._living.pop(pidfd)
        os.close(pidfd)
        with told:
            told.send(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())

    def _become_copy(self, output: int, told: socket.socket) -> None:
        for mine in (self._control, told, *(each for _, each in self._living.values())):
            mine.close()
        for pidfd in self._living:
            os.close(pidfd)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(output, stream.fileno())
        os.close(output)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    # Ctrl-C is for the copies.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # As `python -m` has it.
    sys.path[0] = str(ROOT)
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # as entry points do before they import grpc
    if "router.app" in sys.argv:
        keep_torch_out()  # as the router's entry point does
    for module in sys.argv[2:]:
        importlib.import_module(module)
    assert len(os.listdir("/proc/self/task")) == 1, "a lock that another thread holds would stay locked in the copies"
    # What is there already is nobody's garbage: a collection in a copy would copy the pages that it looks at.
    gc.freeze()
    command = _Template(control).next_command()
    if command is not None:
        os.environ.clear()
        os.environ.update(command["environment"])
        module, *arguments = command["command"]
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
