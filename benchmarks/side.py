"""A process that takes part in a benchmark: it is told a line, and answers with a line of JSON."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from tandem.config import TINY_MODEL

STOP_S = 15.0
KV_SIDE = Path(__file__).resolve().parent / "kv_side.py"
STORE_BYTES = 1 << 30


class Side:
    """Its stdin's end is its end. A script of this folder is run with -P: router is the package then, not router.py."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        stderr: int | None = None,
        own_group: bool = False,
    ) -> None:
        """own_group: a signal can then reach the process and its children."""
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=environment,
            start_new_session=own_group,
        )
        # What it says once it is ready.
        self.hello = self.read()

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self.read()

    def read(self) -> dict[str, Any]:
        """The next line of JSON; libraries may print others."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise SystemExit(f"{self._process.args!r} ended with {self._process.wait()}")

    def cpu_s(self) -> float:
        return cpu_s(self.pid)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


class RayCluster(NamedTuple):
    # The process that it lives and ends with.
    side: Side
    address: str
    # Of processes that are to join it, its token among it.
    environment: dict[str, str]


@contextmanager
def ray_cluster(environment: Mapping[str, str], **resources: int) -> Iterator[RayCluster]:
    """Of one node, and nobody else's. environment: of its own processes; resources: custom ones of its node."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    joining = {**os.environ, **token, **environment}
    # Paths of unix sockets are short.
    with tempfile.TemporaryDirectory(prefix="r-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        command = [sys.executable, "-P", str(KV_SIDE), "head", folder, str(STORE_BYTES), json.dumps(resources)]
        side = Side(command, joining)
        try:
            yield RayCluster(side, side.hello["address"], joining)
        finally:
            side.close()


@contextmanager
def routing(
    http_port: int, cores: Sequence[int], launcher: Sequence[str] = (sys.executable,)
) -> Iterator[tuple[int, str]]:
    """The process id and address of a router with the tiny model's tokenizer. It logs to a file, as others do."""
    options = ["--port", "0", "--http-port", str(http_port), "--model", str(TINY_MODEL)]
    command = [*launcher, "-P", "-m", "router", *options]
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        psutil.Process(process.pid).cpu_affinity(list(cores))
        try:
            assert process.stdout is not None
            yield process.pid, process.stdout.readline().split()[-1]
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()


def cpu_s(pid: int) -> float:
    """Of the process and its children."""
    whole = psutil.Process(pid)
    times = [each.cpu_times() for each in (whole, *whole.children(recursive=True))]
    return sum(each.user + each.system for each in times)
