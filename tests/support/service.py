"""The real service for a test: router and workers as processes of their own, on free loopback ports."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from forked import Forked

import tandem
from tandem.client.status import Integrity, ServiceStatus, WorkerState
from tandem.config import TINY_MODEL
from tandem.types import Role

ROOT = Path(__file__).resolve().parents[2]
START_S = 120.0


def wait_until(condition: Callable[[], Any], timeout_s: float = 10.0, what: str = "the condition") -> Any:
    """The condition's first true value; fails the test after timeout_s."""
    pause = threading.Event()
    end = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < end, f"{what} did not come true within {timeout_s} s"
        pause.wait(0.01)
    return value


def unseen_prompt(tokens: int) -> list[int]:
    """Never twice the same: no prefix-cache hit."""
    return [random.SystemRandom().randrange(3, 1500) for _ in range(tokens)]


def fresh(*command: str) -> subprocess.Popen[str]:
    """What `Forked` is a quick copy of."""
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )


Launch = Callable[..., Forked | subprocess.Popen[str]]


class Process:
    """One child with its output kept; ready when it has printed `ready HOST:PORT`."""

    def __init__(self, name: str, *command: str, launch: Launch = Forked) -> None:
        self.name = name
        self.lines: list[str] = []
        self.popen = launch(*command)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def wait_ready(self) -> str:
        """host:port"""
        wait_until(lambda: self._address() or self.popen.poll() is not None, START_S, f"{self.name} ready")
        address = self._address()
        assert address, f"{self.name} ended with {self.popen.returncode}:\n{self.output}"
        return address

    def wait_exit(self, timeout_s: float = START_S) -> int:
        code = self.popen.wait(timeout_s)
        self._reader.join(5)
        return code

    def send(self, signum: signal.Signals) -> None:
        """To nobody if it has ended."""
        self.popen.send_signal(signum)

    def terminate(self) -> None:
        """Asks it to leave."""
        if self.popen.poll() is None:
            self.send(signal.SIGTERM)

    def stop(self) -> None:
        self.terminate()
        self.wait_stopped()

    def wait_stopped(self) -> None:
        """After `terminate`: kills it when it does not leave."""
        try:
            self.popen.wait(15)
        except subprocess.TimeoutExpired:
            self.send(signal.SIGKILL)
            self.popen.wait(5)
        self._reader.join(5)
        assert self.popen.stdout is not None
        self.popen.stdout.close()

    def _address(self) -> str | None:
        found = [match[1] for line in list(self.lines) if (match := re.match(r"ready (\S+)$", line))]
        return found[0] if found else None

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self.lines.append(line.rstrip("\n"))


def stop_all(processes: Iterable[Process]) -> None:
    """All of them leave at once: one after the other would wait for each one's grace."""
    leaving = list(processes)
    for process in leaving:
        process.terminate()
    for process in leaving:
        process.wait_stopped()


class Service:
    def __init__(self, folder: Path, settings: dict[str, dict[str, Any]], launch: Launch = Forked) -> None:
        self._folder = folder
        self._launch = launch
        self._settings = settings
        self.processes: dict[str, Process] = {}
        self.router = self.start("router", "router", "--port", "0", "--http-port", "0", router={})
        self.address = self.router.wait_ready()
        self.client = tandem.Client(self.address)

    @property
    def http(self) -> str:
        """Of its HTTP door: http://host:port"""
        return f"http://{self.address.rpartition(':')[0]}:{self.status().http_port}"

    def start(self, name: str, *command: str, **overrides: dict[str, Any]) -> Process:
        """A process with this service's settings, sections overridden."""
        settings = {key: {**self._settings.get(key, {}), **overrides.get(key, {})} for key in self._settings}
        path = self._folder / f"{name}.json"
        path.write_text(json.dumps(settings))
        process = Process(name, *command, "--config", str(path), launch=self._launch)
        self.processes[name] = process
        return process

    def start_worker(self, name: str, role: str, **overrides: dict[str, Any]) -> Process:
        """role: prefill, decode (each by its own room's entry point) or both."""
        entry = ("tandem.cli.main", "worker", "--role", "both") if role == "both" else (f"{role}_worker",)
        return self.start(name, *entry, "--router", self.address, **overrides)

    def wait_joined(self, count: int) -> None:
        wait_until(
            lambda: self._all_alive() and len(self.status().workers) == count, START_S, f"{count} workers joined"
        )

    def status(self, check_integrity: bool = False) -> ServiceStatus:
        return self.client.status(check_integrity=check_integrity)

    def worker_of(self, role: Role, check_integrity: bool = False) -> WorkerState:
        """The first worker that plays it."""
        workers = self.status(check_integrity).workers
        return next(worker for worker in workers if role in worker.roles)

    def integrity_of(self, role: Role) -> Integrity:
        check = self.worker_of(role, check_integrity=True).integrity
        assert check is not None
        return check

    def kill(self, name: str) -> None:
        """SIGKILL, by pid."""
        process = self.processes.pop(name)
        process.send(signal.SIGKILL)
        process.wait_exit()
        process.stop()

    def idle(self) -> bool:
        """No live request, and no worker holds anything."""
        status = self.status(check_integrity=True)
        checks = [worker.integrity for worker in status.workers]
        assert all(check is not None and check.ok for check in checks), checks
        return status.live_requests == 0 and all(
            (check.referenced_blocks, check.reservations, check.quarantined_blocks, check.live_sequences)
            == (0, 0, 0, 0)
            for check in checks
            if check is not None
        )

    def close(self) -> None:
        """Proves that nothing leaked, then stops everything."""
        try:
            wait_until(self.idle, 10, "a service without orphans")
        finally:
            self.client.close()
            stop_all(self.processes.values())

    def _all_alive(self) -> bool:
        for process in self.processes.values():
            assert process.popen.poll() is None, f"{process.name} ended:\n{process.output}"
        return True


@contextmanager
def running_service(
    folder: Path,
    model: Path = TINY_MODEL,
    *,
    prefill: int = 1,
    decode: int = 1,
    colocated: int = 0,
    wait: bool = True,
    launch: Launch = Forked,
    **settings: dict[str, Any],
) -> Iterator[Service]:
    """Workers named prefill-0, decode-0, colocated-0 and so on; integrity is checked at the end.

    With wait=False the caller waits for the workers itself (wait_joined), so that several services start side by side.
    """
    sections: dict[str, dict[str, Any]] = {"model": {"path": str(model)}, "engine": {}, "worker": {}, "router": {}}
    sections["engine"] = {"kv_memory_mib": 32, "threads": 1}
    for name, values in settings.items():
        sections[name].update(values)
    folder.mkdir(parents=True, exist_ok=True)
    service = Service(folder, sections, launch)
    try:
        for role, count in (("prefill", prefill), ("decode", decode), ("both", colocated)):
            for index in range(count):
                service.start_worker(f"{'colocated' if role == 'both' else role}-{index}", role)
        if wait:
            service.wait_joined(prefill + decode + colocated)
        yield service
    except BaseException:
        for process in service.processes.values():
            print(f"--- {process.name}\n{process.output}")
        raise
    finally:
        service.close()
