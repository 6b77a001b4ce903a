"""The routing policy of docs/extend.md, as a reader would try it: a module of their own, named in the configuration."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from forked import Forked
from service import ROOT, Service, fresh, running_service, wait_until

from tandem.types import Accepted, SamplingParams

LONG = SamplingParams(max_tokens=1200, ignore_eos=True)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """On the path of every process that starts from now on; the module of the docs is in it."""
    (source,) = re.findall(r"```python\n(.*?)```", section("A routing policy"), re.DOTALL)
    (tmp_path / "packing.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def section(title: str) -> str:
    text = (ROOT / "docs" / "extend.md").read_text()
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def launch(*command: str) -> Forked | subprocess.Popen[str]:
    """A copy of a process has its path, so the router is a process from the beginning."""
    return fresh(*command) if command[0] == "router" else Forked(*command)


@pytest.fixture
def service(folder: Path) -> Iterator[Service]:
    (configured,) = re.findall(r"^  policy: (\S+)", section("A routing policy"), re.MULTILINE)
    with running_service(
        folder, decode=2, launch=launch, router={"policy": configured, "heartbeat_interval_s": 0.05}
    ) as running:
        yield running


def placed(service: Service) -> list[str]:
    """The decode workers of live requests."""
    return [request.decode_worker for request in service.status().requests if request.decode_worker]


def test_the_policy_of_the_docs_places_requests(service: Service) -> None:
    """All on one decode worker: the default policy would give each worker every other one."""
    first = min(worker.worker_id for worker in service.status().workers if "decode" in worker.roles)
    with ExitStack() as stack:
        answers = [stack.enter_context(service.client.generate([5 + n] * 40, sampling=LONG)) for n in range(3)]
        live = [iter(answer) for answer in answers]
        assert all(isinstance(next(events), Accepted) for events in live)
        wait_until(lambda: len(placed(service)) == 3, what="three placed requests")
        assert placed(service) == [first] * 3
    wait_until(service.idle, what="everything given back")


def test_a_policy_that_is_not_there_ends_the_router_at_its_start(folder: Path) -> None:
    (folder / "wrong.json").write_text('{"router": {"policy": "packing:Sorted", "port": 0, "http_port": -1}}')
    ran = subprocess.run(
        [sys.executable, "-m", "router", "--config", str(folder / "wrong.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 2
    words = "cannot make a policy of 'packing:Sorted': AttributeError: module 'packing' has no attribute 'Sorted'"
    assert ran.stderr == f"error: router.policy: {words}\n"
