"""scripts/house.py counts right, on a small house whose figures are known."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORKER = '''"""A room."""

log = logger = None
logger = log


class Twin:
    # Of the worker.
    count: int = 0

    def run(self) -> int:
        """Two lines of code
        below three of docstring, which do not count.
        """
        return _once(self.count)


def _once(count):
    return _twice(_twice(count))


def _twice(count):
    return count + 1
'''
ROUTER = "from __future__ import annotations\n\n\nclass Twin:\n    def run(self) -> None:\n        {}\n".format(
    "\n        ".join(f"self.field = {number}" for number in range(41))
)


def figures(house: Path, *flags: str) -> str:
    command = [sys.executable, str(ROOT / "scripts/house.py"), str(house), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def test_figures_of_a_small_house(tmp_path: Path) -> None:
    for name, text in {
        "prefill_worker/worker.py": WORKER,
        "router/life/router.py": ROUTER,
        "tandem/engine/host.py": "class Host:\n    def run(self):\n        pass\n",
        "tandem/v1/stub_pb2.py": "class Twin: ...\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    said = figures(tmp_path, "--list")
    rows = {line.split()[0]: line.split()[1:] for line in said.splitlines()}
    # Files, lines, functions; the median, ninth tenth and longest of their lengths; the share of helpers.
    assert rows["prefill_worker"] == ["1", "23", "3", "2", "2", "2", "33%"]
    assert rows["router/life"] == ["1", "46", "1", "42", "42", "42", "0%"]
    assert rows["all"] == ["3", "72", "5", "2", "2", "42", "20%"]
    assert "helpers: 1\n    prefill_worker/worker.py:18 _once, 2 lines\n" in said
    assert "lines: 1\n    router/life/router.py:5 run, 42 lines\n" in said
    assert "class names in two rooms: 1\n    Twin: prefill_worker router\n" in said
    assert "named alike in three rooms: 1\n    run: prefill_worker router tandem/engine\n" in said
    assert "open with 'Of': 1\n    prefill_worker/worker.py:8 # Of the worker.\n" in said
    assert "not `log`: 1\n    prefill_worker/worker.py:4 logger = log\n" in said
    assert said.endswith("__future__ import: 1\n    prefill_worker/worker.py\n")


def test_the_list_names_what_the_counts_count() -> None:
    """On the real house."""
    named = figures(ROOT, "--list").splitlines()
    counts = [line for line in named if not line.startswith("    ")]
    assert counts == figures(ROOT).splitlines()
    assert len(named) - len(counts) == sum(int(line.rpartition(" ")[2]) for line in counts if ": " in line)
