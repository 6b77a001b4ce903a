"""Policies of somebody else's: what is wrong with one is said, of the configuration or of the request at hand."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from router.policy.base import Demand, Placement, WorkerView
from router.policy.placement import Placer
from tandem.errors import ConfigError, InternalError, Unavailable
from tandem.types import Role

VIEW = WorkerView("p1", frozenset({Role.PREFILL}), False, 16, 100, 100, 0, 0)
WORKERS = (
    VIEW,
    replace(VIEW, worker_id="p2", draining=True),
    replace(VIEW, worker_id="p3", total_blocks=1),
    replace(VIEW, worker_id="d1", roles=frozenset({Role.DECODE})),
)
SMALL = Demand(prompt_tokens=20, max_tokens=10)
POLICY = """
from router.policy.base import Placement

class Named:
    def choose_pair(self, prefills, decodes, demand):
        return {pair}

    def choose_prefill(self, prefills, prompt_tokens):
        return {prefill}
"""
Write = Callable[[str], None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Makes the module `theirs`."""
    monkeypatch.syspath_prepend(tmp_path)

    def write_module(source: str) -> None:
        (tmp_path / "theirs.py").write_text(source)

    yield write_module
    sys.modules.pop("theirs", None)


def test_a_policy_of_ones_own_decides(write: Write) -> None:
    write(POLICY.format(pair="Placement('p1', decodes[-1].worker_id)", prefill="prefills[0].worker_id"))
    placer = Placer("theirs:Named")
    assert placer.choose(WORKERS, SMALL) == Placement("p1", "d1")
    assert placer.choose_prefill(WORKERS, 20).worker_id == "p1"


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ("Placement('x', 'd1')", "chose 'x' as the prefill worker, which is not there"),
        ("Placement('d1', 'd1')", "chose 'd1' as the prefill worker, which does not play prefill"),
        ("Placement('p1', 'p1')", "chose 'p1' as the decode worker, which does not play decode"),
        ("Placement('p2', 'd1')", "chose 'p2' as the prefill worker, which is draining"),
        ("Placement('p3', 'd1')", "chose 'p3' as the prefill worker, which is too small for the request"),
        ("Placement([], {})", "chose [] as the prefill worker, which is not there"),
        ("('p1', 'd1')", "answered ('p1', 'd1'), which is no Placement"),
        ("1 / 0", "raised ZeroDivisionError; the router's log has the details"),
    ],
)
def test_a_wrong_answer_fails_the_request_by_name(
    write: Write, pair: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(POLICY.format(pair=pair, prefill="demand"))
    placer = Placer("theirs:Named")
    with pytest.raises(InternalError) as caught:
        placer.choose(WORKERS, SMALL)
    assert caught.value.message == f"the routing policy theirs:Named {words} (router.policy)"
    (record,) = caplog.records
    assert (record.getMessage(), bool(record.exc_info)) == (caught.value.message, "raised" in words)
    with pytest.raises(InternalError, match="raised NameError"):
        placer.choose_prefill(WORKERS, 20)


def test_nobody_is_asked_when_nobody_could_be_chosen(write: Write) -> None:
    write(POLICY.format(pair="1 / 0", prefill="1 / 0"))
    with pytest.raises(Unavailable, match="no decode worker has joined"):
        Placer("theirs:Named").choose(WORKERS[:1], SMALL)


@pytest.mark.parametrize(
    ("name", "source", "words"),
    [
        ("cash_aware", "", "there is no policy 'cash_aware': say one of cache_aware, or module:Class for your own"),
        ("", "", "there is no policy ''"),
        ("theirs:Policy", "", "cannot make a policy of 'theirs:Policy': AttributeError: module 'theirs' has no"),
        ("theirs:", "", "cannot make a policy of 'theirs:': AttributeError"),
        (":Policy", "", "cannot make a policy of ':Policy': ValueError"),
        ("no_such_module:Policy", "", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("theirs:Policy", "def broken(", "SyntaxError"),
        ("theirs:Policy", "import torch_of_theirs", "No module named 'torch_of_theirs'"),
        ("theirs:Policy", "Policy = 3", "TypeError: 'int' object is not callable"),
        ("theirs:Policy", "class Policy:\n    def __init__(self, weight): ...", "TypeError"),
        ("theirs:Policy", "class Policy:\n    def choose_pair(self): ...", "lacks choose_pair or choose_prefill"),
    ],
)
def test_a_wrong_name_is_a_wrong_configuration(write: Write, name: str, source: str, words: str) -> None:
    write(source)
    with pytest.raises(ConfigError) as caught:
        Placer(name)
    assert caught.value.field == "router.policy"
    assert caught.value.message.startswith("router.policy: ")
    assert words in caught.value.message
