"""`tandem bench compare` end to end: real services of the tiny model, and nothing left of them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from loadtest.compare.model import Comparison
from tandem.cli.app import app
from tandem.engine.backends.cores import usable_cores

ROOT = Path(__file__).resolve().parents[2]
BOUND_S = 240.0
SMALL = ["--input-len", "40", "--output-len", "6", "--num-prompts", "10", "--min-seconds", "0"]
LOAD = [*SMALL, "--resolution", "1", "--start-rate", "8", "--step-tokens", "32", "--draws", "1"]

pytestmark = pytest.mark.skipif(len(usable_cores()) < 2, reason="two workers need two cores")


class Running:
    """The command, what it said on stderr, and every process that it ever had below it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self.below: set[psutil.Process] = set()
        self.measured = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            self.below |= set(psutil.Process(self.process.pid).children(recursive=True))
            if "requests met all" in line:
                self.measured.set()

    def ended(self) -> int:
        code = self.process.wait(BOUND_S)
        self._reader.join(10)
        return code


@contextmanager
def comparing(output: Path, *args: str) -> Iterator[Running]:
    """Afterwards no process of it is left."""
    command = [sys.executable, "-m", "tandem.cli.main", "bench", "compare", *LOAD, "--output", str(output), *args]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        running = Running(process)
        try:
            yield running
        finally:
            if process.poll() is None:
                process.kill()
    assert len(running.below) >= 6, running.lines  # two services of a router and two workers
    assert not [each for each in running.below if each.is_running()]


def found_in(output: Path) -> Comparison:
    """What the JSON file says; the page beside it is whole."""
    assert output.with_suffix(".html").read_text(encoding="utf-8").rstrip().endswith("</html>")
    return Comparison.model_validate_json(output.with_suffix(".json").read_text(encoding="utf-8"))


def test_both_shapes_are_measured_on_the_same_cores(tmp_path: Path) -> None:
    with comparing(tmp_path / "found.json", "--goodput", "ttft:5000", "tpot:2000", "--time-limit", "25") as running:
        assert running.ended() == 0, running.lines
        assert running.process.stdout is not None
        out = running.process.stdout.read()
    found = found_in(tmp_path / "found")
    assert [each.shape.name for each in found.measured] == ["2 colocated, 32-token steps", "1P1D"]
    cores = {each.shape.name: sorted(use.cores for use in each.probes[0].use) for each in found.measured if each.probes}
    assert len(cores) == 2
    assert len({str(pinned) for pinned in cores.values()}) == 1
    first = next(iter(cores.values()))
    assert len(first) == 2
    assert not set(first[0]) & set(first[1])
    for each in found.measured:
        assert each.probes[0].rate_rps == 8
        assert all(0 <= use.busy <= 1.5 for run in each.probes for use in run.use)
        assert each.best_rate_rps >= 8
        assert all(len(run.answers) == run.offered for run in each.shown)
        assert {use.pool for use in each.probes[0].use} == (
            {"prefill", "decode"} if each.shape.is_split else {"colocated"}
        )
    answer = next(answer for each in found.measured if each.shape.is_split for answer in each.shown[0].answers)
    assert answer.prefill_worker != answer.decode_worker
    assert {answer.prefill_worker, answer.decode_worker} == {use.worker for use in found.measured[1].probes[0].use}
    assert answer.output_tokens == 6
    assert 2 <= len(answer.arrivals_s) <= 6  # a busy router sends several at once
    assert found.verdict.text[-1] in " ".join(out.split())


def test_ctrl_c_gives_what_was_found(tmp_path: Path) -> None:
    with comparing(tmp_path / "found", "--goodput", "ttft:60000") as running:
        assert running.measured.wait(BOUND_S)
        os.kill(running.process.pid, signal.SIGINT)
        assert running.ended() == 130, running.lines
    found = found_in(tmp_path / "found")
    assert found.interrupted
    assert found.verdict.text[0].startswith("The comparison was cut off")
    assert sum(len(each.probes) for each in found.measured) >= 1


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "--goodput must limit ttft or e2el"),
        (["--goodput", "ttft:0"], "--goodput takes ttft"),
        (["--goodput", "ttft:9", "--workers", "1"], "--workers must be in [2, 16], not 1"),
        (["--goodput", "ttft:9", "--step-tokens", "0"], "--step-tokens takes different numbers"),
        (["--goodput", "ttft:9", "--num-prompts", "5"], "--num-prompts must be 10 or more"),
        (["--goodput", "ttft:9", "--output", "/nowhere/x"], "cannot write /nowhere/x.json"),
        (["--goodput", "ttft:9", "--output", "."], "--output must name a file, not ."),
        (["--goodput", "ttft:9", "--model", "/nowhere/x"], "there is no such directory: /nowhere/x"),
        (["--goodput", "ttft:9", "--config", "/nowhere/x"], "cannot read config file /nowhere/x"),
    ],
)
def test_what_cannot_be_is_one_line(args: list[str], words: str) -> None:
    result = CliRunner().invoke(app, ["bench", "compare", *args])
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1), result.stderr
    assert words in re.sub(r"\s+", " ", result.stderr)


def test_threads_of_the_users_choice_are_refused(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("engine: {threads: 2}\n")
    result = CliRunner().invoke(app, ["bench", "compare", "--goodput", "ttft:9", "--config", str(config)])
    assert result.exit_code == 2
    assert "engine.threads: a comparison gives every worker its own cores" in result.stderr
