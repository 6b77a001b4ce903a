"""`tandem serve` whose log nobody takes: it answers, starts again what dies, and stops when it is told to."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest
from service import wait_until
from supervised import BOUND_S, ENVIRONMENT
from wordy_worker import HELD, WORDS

import tandem
from tandem.errors import TandemError

SUPPORT = Path(__file__).resolve().parents[1] / "support"
# Every one of them has its worker print 150 KB: all of them more than all pipes and processes on the way keep.
REQUESTS = 40
STOP_S = 30.0


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


class Served:
    """`tandem serve` with one wordy worker that plays both roles."""

    def __init__(self, stdout: int, stderr: int, *arguments: str) -> None:
        self.port, self.http = free_ports(2)
        # Of a machine that has much else to do a late heartbeat says nothing.
        self.config = tempfile.NamedTemporaryFile("w", suffix=".json")  # noqa: SIM115
        self.config.write(json.dumps({"router": {"heartbeat_timeout_s": BOUND_S}}))
        self.config.flush()
        command = [sys.executable, str(SUPPORT / "serve_wordy.py"), "serve", "--colocated", "1", *arguments]
        self.process = subprocess.Popen(
            [*command, "--config", self.config.name, "--port", str(self.port), "--http-port", str(self.http)],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env={**os.environ, **ENVIRONMENT},
            start_new_session=True,
        )
        self.client = tandem.Client(f"127.0.0.1:{self.port}", timeout_s=BOUND_S)

    def workers(self) -> set[int]:
        """Pids."""
        assert self.process.poll() is None, "it ended"
        with suppress(TandemError):
            return {worker.pid for worker in self.client.status().workers}
        return set()

    def ask(self) -> None:
        assert len(self.client.complete([1, 2, 3], max_tokens=4).choices[0].tokens) == 4

    def stop(self, number: int = signal.SIGINT) -> int:
        self.process.send_signal(number)
        return self.process.wait(STOP_S)


@contextmanager
def serving(stdout: int, stderr: int, *arguments: str) -> Iterator[Served]:
    served, family = Served(stdout, stderr, *arguments), list[psutil.Process]()
    try:
        wait_until(served.workers, BOUND_S, "a worker")
        family += psutil.Process(served.process.pid).children(recursive=True)
        yield served
    finally:
        served.client.close()
        served.config.close()
        family += psutil.Process(served.process.pid).children(recursive=True) if served.process.poll() is None else []
        served.process.kill()
        served.process.wait()
        _, alive = psutil.wait_procs(family, timeout=BOUND_S)
        assert alive == []


class Reading(threading.Thread):
    """Takes what the service prints, until all of its processes are gone."""

    def __init__(self, fd: int) -> None:
        super().__init__(daemon=True)
        self._fd, self._got = fd, b""
        self.start()

    def run(self) -> None:
        with suppress(OSError), open(self._fd, "rb", buffering=0) as file:  # a terminal's end is an error
            while data := file.read(1 << 16):
                self._got += data

    def has_words(self) -> bool:
        return WORDS.encode() in self._got

    def tells_of_loss(self) -> bool:
        return b"lost here: this output could not be written" in self._got

    def text(self) -> str:
        self.join(BOUND_S)
        assert not self.is_alive()
        return self._got.decode()


def answers_and_comes_back(served: Served) -> None:
    for _ in range(REQUESTS):
        served.ask()
    (before,) = served.workers()
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: served.workers() - {before}, BOUND_S, "the worker's return")
    served.ask()


def test_a_full_disk_and_a_reader_that_is_gone_stop_nothing() -> None:
    """`| head`, or an ssh session that ends."""
    full, (ours, theirs) = os.open("/dev/full", os.O_WRONLY), os.pipe()
    os.close(ours)
    with serving(theirs, full) as served:
        answers_and_comes_back(served)
        for fd in (full, theirs):
            with pytest.raises(OSError, match=r"No space left|Broken pipe"):
                os.write(fd, b"x")
        assert served.stop() == 0
    os.close(full)
    os.close(theirs)


def test_a_stopped_terminal_and_a_reader_that_never_reads_stop_nothing() -> None:
    (unread, stdout), (terminal, stderr) = os.pipe(), pty.openpty()
    while select.select([], [stdout], [], 0)[1]:
        os.write(stdout, b"x" * 4096)
    termios.tcflow(stderr, termios.TCOOFF)  # Ctrl-S
    with serving(stdout, stderr) as served:
        answers_and_comes_back(served)
        assert not select.select([], [stdout, stderr], [], 0)[1]
        termios.tcflow(stderr, termios.TCOON)  # Ctrl-Q
        reading = Reading(terminal)
        wait_until(reading.has_words, BOUND_S, "words of the worker")
        os.close(stderr)
        assert served.stop() == 0
    reading.join(BOUND_S)
    os.close(unread)
    os.close(stdout)


def test_a_supervisor_that_is_stopped_stops_nobody_else() -> None:
    """Ctrl-Z, and `bg`. And in the end two signals: the second one waits for no stream."""
    ours, theirs = os.pipe()
    with serving(theirs, theirs) as served:
        os.close(theirs)
        reading = Reading(ours)
        served.process.send_signal(signal.SIGSTOP)
        for _ in range(REQUESTS):
            served.ask()
        assert psutil.Process(served.process.pid).status() == psutil.STATUS_STOPPED
        served.process.send_signal(signal.SIGCONT)
        wait_until(reading.tells_of_loss, BOUND_S, "the loss told")
        stream = iter(served.client.generate([HELD, 2], max_tokens=500))
        next(event for event in stream if isinstance(event, tandem.Delta))
        served.process.send_signal(signal.SIGTERM)
        assert served.stop() == 0
        with pytest.raises(tandem.errors.Unavailable, match="the router stopped before the request had ended"):
            list(stream)


def test_streams_end_before_a_service_that_is_told_to_stop() -> None:
    """And nobody new is let in meanwhile; the log is JSON, and tells of all that."""
    ours, theirs = os.pipe()
    with serving(subprocess.DEVNULL, theirs, "--log-format", "json") as served:
        os.close(theirs)
        reading = Reading(ours)
        stream = iter(served.client.generate([HELD, 2], max_tokens=60))
        next(event for event in stream if isinstance(event, tandem.Delta))
        served.process.send_signal(signal.SIGHUP)  # its terminal is closed
        served.process.send_signal(signal.SIGHUP)  # the shell says so too
        ready = f"http://127.0.0.1:{served.http}/ready"
        wait_until(lambda: httpx.get(ready).status_code == 503, BOUND_S, "the drain")
        body = {"prompt": [1], "max_tokens": 1}
        refused = httpx.post(f"http://127.0.0.1:{served.http}/v1/completions", json=body)
        assert (refused.status_code, refused.json()["error"]["message"]) == (503, "the router is stopping")
        assert refused.headers["retry-after"] == "1"
        with pytest.raises(tandem.errors.Unavailable, match="the router is stopping"):
            served.ask()
        (worker,) = served.workers()
        os.kill(worker, signal.SIGUSR1)
        *_, completed = stream
        assert isinstance(completed, tandem.Completed)
        assert completed.usage.output_tokens == 60
        assert served.process.wait(STOP_S) == 0
    said = [json.loads(line) for line in reading.text().splitlines()]
    ended = {line["request_id"]: line for line in said if line["message"] == "ended"}
    refusal = ended[refused.headers["x-request-id"]]
    assert (refusal["process"], refusal["error"], refusal["status"]) == ("router", "unavailable", 503)
    assert [line["output_tokens"] for line in ended.values() if line.get("finish_reason")] == [60]
