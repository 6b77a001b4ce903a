"""`make zoo`: tries every architecture with every feature and writes the table in docs/models.md.

    run_zoo.py [--results FILE] [--no-table] [--feature TEXT] [ARCHITECTURE...]

Exit code 1 where one is neither exact nor refused.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import select
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from zoo_configs import ARCHITECTURES, text_fields, tiny
from zoo_features import features
from zoo_result import GOOD, Outcome, Result
from zoo_table import write

HERE = Path(__file__).resolve().parent
# A trial takes a second or two; where numba's cache is cold, the first takes most of a minute, on a busy machine ten.
TRIAL_S = 600.0


@dataclass(frozen=True)
class Trial:
    architecture: str
    feature: str
    changes: dict[str, Any]


class Worker:
    """A process that tries one model after another; a new one follows where it died or hung."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def tried(self, trial: Trial) -> Result:
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        names = trial.architecture, trial.feature
        job = {"architecture": trial.architecture, "changes": trial.changes}
        process.stdin.write(json.dumps(job).encode() + b"\n")
        process.stdin.flush()
        if not select.select([process.stdout], [], [], TRIAL_S)[0]:
            self.end()
            return Result(*names, Outcome.HUNG, f"no verdict within {TRIAL_S:.0f} s")
        answer = process.stdout.readline()
        if not answer:
            code = process.wait()
            self._process = None
            return Result(*names, Outcome.CRASHED, f"the process ended with {code}")
        verdict = json.loads(answer)
        return Result(*names, verdict["outcome"], verdict["words"])

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, HERE / "zoo_worker.py"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
            )
        return self._process


def trials(architectures: list[str]) -> list[Trial]:
    found = []
    for architecture in architectures:
        try:
            fields = text_fields(tiny(architecture))
        except Exception:  # told by the trial itself
            fields = {}
        found += [Trial(architecture, name, changes) for name, changes in features(fields)]
    return found


def run(todo: list[Trial], note: Any) -> list[Result]:
    """In as many processes as this one has cores; `note` hears of each result as it comes."""
    waiting: queue.SimpleQueue[Trial] = queue.SimpleQueue()
    for trial in todo:
        waiting.put(trial)
    results: list[Result] = []

    def work() -> None:
        worker = Worker()
        try:
            while True:
                result = worker.tried(waiting.get_nowait())
                results.append(result)
                note(result)
        except queue.Empty:
            worker.end()

    threads = [threading.Thread(target=work) for _ in os.sched_getaffinity(0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--results", type=Path, help="write a JSON line for each trial")
    parser.add_argument("--no-table", action="store_true", help="leave docs/models.md as it is")
    parser.add_argument("--feature", default="", help="only features whose name contains this")
    parser.add_argument("architectures", nargs="*", default=ARCHITECTURES)
    arguments = parser.parse_args()
    todo = [trial for trial in trials(arguments.architectures) if arguments.feature in trial.feature]
    sink = arguments.results.open("w") if arguments.results else None

    def note(result: Result) -> None:
        if sink is not None:
            print(json.dumps(asdict(result)), file=sink, flush=True)
        if result.outcome not in GOOD:
            print(f"{result.architecture}, {result.feature}: {result.outcome}: {result.words}", flush=True)

    results = run(todo, note)
    if not arguments.no_table:
        write(results)
    bad = [result for result in results if result.outcome not in GOOD]
    print(f"{len(results)} trials, {len(bad)} neither exact nor refused")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
