"""A Ray cluster of one node for tests: private ports, folder and token, ended by its own pid."""

from __future__ import annotations

import json
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from service import ROOT, wait_until

START_S = 60.0
STORE_BYTES = 256 << 20


def free_ports(count: int) -> list[int]:
    """Of those that the kernel gives nobody who asks for any: half a minute later they are still free."""
    first_given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    free: list[int] = []
    for port in random.sample(range(20_000, max(first_given, 30_000)), 100):  # below are those of Ray's workers
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            free.append(port)
    return free[:count]


def environment(token: str) -> dict[str, str]:
    """For processes of the cluster and those that talk to it; nothing of another cluster of this user leaks in."""
    own = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return {**own, "RAY_AUTH_TOKEN": token, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


class RayHead:
    def __init__(self, folder: Path, resources: Mapping[str, int], path: Path, spills: bool) -> None:
        self._log = folder / "ray.log"
        self.token = secrets.token_hex(16)
        port, *others = free_ports(5)
        self.address = f"127.0.0.1:{port}"
        options = ("ray-client-server-port", "dashboard-agent-listen-port", "dashboard-port", "metrics-export-port")
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"),
            *(f"--{name}={other}" for name, other in zip(options, others, strict=True)),
            *("--min-worker-port=0", "--max-worker-port=0", f"--temp-dir={folder}"),
            *(f"--object-store-memory={STORE_BYTES}", "--include-dashboard=false", "--disable-usage-stats"),
            *("--num-cpus=0", f"--resources={json.dumps(resources)}"),
            f"--system-config={json.dumps({'automatic_object_spilling_enabled': spills})}",
        ]
        with self._log.open("w") as log:
            self._popen = subprocess.Popen(
                command,
                env={**environment(self.token), "PYTHONPATH": str(path)},
                cwd=folder,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )

    def wait_ready(self) -> None:
        wait_until(lambda: self._popen.poll() is not None or self._said(), START_S, "the Ray cluster")
        assert self._popen.poll() is None, self._log.read_text()

    def _said(self) -> bool:
        return "Ray runtime started" in self._log.read_text()

    def tandem(self, *words: str, token: str = "", cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        """`tandem WORDS --address ...`"""
        return subprocess.run(
            [sys.executable, "-m", "tandem.cli.main", *words, "--address", self.address],
            env=environment(token or self.token),
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=110,
        )

    def stop(self) -> None:
        family = psutil.Process(self._popen.pid).children(recursive=True) if self._popen.poll() is None else []
        self._popen.terminate()
        try:
            self._popen.wait(30)
        finally:
            _, left = psutil.wait_procs(family, timeout=5)
            for process in left:
                process.kill()


@contextmanager
def ray_head(path: Path = ROOT, spills: bool = True, **resources: int) -> Iterator[RayHead]:
    """path: where its processes import from; resources: custom ones of its node.

    spills: objects go to disk when the store is full.
    """
    # Paths of unix sockets are short: pytest's own folders are too deep.
    with tempfile.TemporaryDirectory(prefix="r-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        head = RayHead(Path(folder), resources, path, spills)
        try:
            head.wait_ready()
            yield head
        finally:
            head.stop()


@contextmanager
def joined(address: str, token: str) -> Iterator[None]:
    """This process is a part of the cluster. Ray reads a process's token once: no second cluster in it."""
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    os.environ.pop("RAY_AUTH_MODE", None)
    os.environ["RAY_AUTH_TOKEN"] = token
    import ray
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

    # Ray reads its environment when it is imported, which another test may have done already; this reads it again.
    maybe_enable_token_auth_if_token_available()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    for signum, handler in handlers.items():
        signal.signal(signum, handler)  # Ray has put its own there
    try:
        yield
    finally:
        ray.shutdown()
