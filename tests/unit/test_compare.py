"""`tandem bench compare` without a service: shapes, the search, early stops, the verdict."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
from service import wait_until

from loadtest.compare.judge import Judge, keeps
from loadtest.compare.processes import cores_of, cpu_seconds, others_cpu_seconds
from loadtest.compare.question import Question, parse_step_tokens
from loadtest.compare.search import MAX_STEPS, Search
from loadtest.compare.shapes import all_shapes
from loadtest.metrics import Goodput, Metric, Outcome
from loadtest.objectives import Objectives
from loadtest.runner import Arrival
from loadtest.schedule.plan import Plan
from loadtest.schedule.workloads import LoadRequest
from loadtest.targets.target import Served
from tandem.engine.backends.cores import usable_cores
from tandem.errors import ConfigError

TTFT: Goodput = {"ttft": 1000}


def test_shapes_of_two_workers() -> None:
    assert [shape.name for shape in all_shapes(2, [32, 512])] == [
        "2 colocated, 32-token steps",
        "2 colocated, 512-token steps",
        "1P1D",
    ]


def test_every_split_of_four_workers_takes_the_largest_budget() -> None:
    split = [shape for shape in all_shapes(4, [512, 64]) if shape.is_split]
    assert [(shape.name, shape.step_tokens) for shape in split] == [("1P3D", 512), ("2P2D", 512), ("3P1D", 512)]


def searched(capacity_rps: float, start_rps: float, resolution: float = 0.1) -> tuple[Search, list[float]]:
    """A service that keeps every rate up to its capacity; the search, and the rates that it tried."""
    search, tried = Search(start_rps, resolution), []
    while not search.done():
        rate = search.next_rps()
        tried.append(rate)
        search.learn(rate, kept=rate <= capacity_rps)
        assert len(tried) <= 2 * MAX_STEPS
    return search, tried


@pytest.mark.parametrize("start_rps", [0.2, 1.0, 3.7, 50.0])
@pytest.mark.parametrize("capacity_rps", [0.31, 1.0, 7.9])
def test_the_search_brackets_the_capacity(start_rps: float, capacity_rps: float) -> None:
    search, tried = searched(capacity_rps, start_rps)
    assert search.kept_rps <= capacity_rps < search.missed_rps <= search.kept_rps * 1.1
    assert len(set(tried)) == len(tried)


def test_a_finer_resolution_takes_more_tries() -> None:
    assert len(searched(1.3, 1.0, 0.02)[1]) > len(searched(1.3, 1.0, 0.2)[1])


def test_a_shape_that_keeps_nothing_ends_the_search() -> None:
    search, tried = searched(0.0, 1.0)
    assert (search.kept_rps, len(tried)) == (0.0, MAX_STEPS + 1)
    given_up = Search(1.0, 0.1)
    given_up.give_up()
    assert given_up.done()


def test_a_shape_that_keeps_everything_ends_the_search() -> None:
    assert searched(math.inf, 1.0)[0].kept_rps == 2.0**MAX_STEPS


def test_a_rival_is_the_floor() -> None:
    """Only the best counts: who missed what a rival kept is out, and who did not looks above that only."""
    slow = Search(4.0, 0.1)
    assert slow.next_rps(floor_rps=4.0) == 8.0
    slow.learn(8.0, kept=False)
    assert slow.next_rps(floor_rps=2.0) == 4.0
    assert not slow.done(floor_rps=7.0)
    assert slow.done(floor_rps=7.5)
    assert slow.done(floor_rps=9.0)


def judge_of(count: int, objectives: Goodput = TTFT, target: float = 0.9, tokens: int = 5) -> Judge:
    request = LoadRequest(np.zeros(4, dtype=np.uint32), tokens)
    return Judge([Arrival(0.0, request)] * count, objectives, target)


def waiting(since_s: float) -> Outcome:
    return Outcome(since_s, 4, since_s)


def answered(due_s: float, *arrivals_s: float) -> Outcome:
    return Outcome(due_s, 4, due_s, list(arrivals_s), len(arrivals_s))


def test_a_load_is_hopeless_when_one_more_is_late_than_may_be() -> None:
    judge, outcomes = judge_of(20), [waiting(0.0), waiting(0.0)]
    assert not judge.hopeless(outcomes, 4.5)
    outcomes.append(waiting(5.0))
    assert not judge.hopeless(outcomes, 5.5)
    assert judge.hopeless(outcomes, 6.1)


def test_looking_at_a_long_load_costs_what_is_under_way() -> None:
    """Those that have ended, or have missed, are looked at once."""

    looks: list[Outcome] = []

    class Counting(Judge):
        def missed_by(self, outcome: Outcome, tokens: int, now_s: float) -> list[Metric] | list[str]:
            looks.append(outcome)
            return super().missed_by(outcome, tokens, now_s)

    request = LoadRequest(np.zeros(4, dtype=np.uint32), 5)
    judge, outcomes = Counting([Arrival(0.0, request)] * 1000, TTFT, 0.5), list[Outcome]()
    for number in range(200):
        done = Outcome(float(number), 4, float(number), [number + 0.1, number + 0.2], 2, ended=True)
        outcomes += [done, waiting(number - 5.0), waiting(float(number))]
        assert not judge.hopeless(outcomes, number + 0.5)
    # One that waits is looked at twice, until it is late; the others once.
    assert len(looks) == 4 * 200 - 1
    assert judge.hopeless([*outcomes, *[waiting(0.0)] * 110], 300.0)


def test_late_counts_from_the_schedule() -> None:
    sent_late = Outcome(0.0, 4, 3.0, [3.5])
    assert judge_of(1).causes([sent_late], 3.6) == {"ttft": 1}


def test_a_slow_answer_is_lost_before_it_has_ended() -> None:
    """Of five tokens two have come, 0.9 s apart: with the rest at once it would be 0.225 s a token."""
    judge = judge_of(1, {"tpot": 200}, 0.5)
    assert judge.hopeless([answered(0.0, 0.1, 1.0)], 1.0)
    assert not judge_of(1, {"tpot": 230}, 0.5).hopeless([answered(0.0, 0.1, 1.0)], 1.0)


def test_a_failure_is_lost_and_an_interruption_is_not() -> None:
    failed, interrupted = waiting(0.0), waiting(0.0)
    failed.set_failure("unavailable", "")
    interrupted.set_failure("interrupted", "")
    assert judge_of(2).causes([failed, interrupted], 0.5) == {"failed": 1}


@pytest.mark.parametrize(("met", "kept"), [(35, False), (36, True), (40, True)])
def test_ninety_percent_of_forty_are_thirty_six(met: int, kept: bool) -> None:
    assert keeps(met / 40, 0.9) is kept
    late = [waiting(0.0)] * (40 - met)
    assert judge_of(40).hopeless(late, 2.0) is not kept


def test_loads_at_two_rates_ask_the_same() -> None:
    question = question_of(min_seconds=10)
    slow, fast = (question.plan_at(rate).schedule(Served("m", 1000)) for rate in (1.0, 2.0))
    assert len(slow.arrivals) == len(fast.arrivals) == 20
    for one, other in zip(slow.arrivals, fast.arrivals, strict=True):
        assert one.at_s == pytest.approx(other.at_s * 2)
        assert one.request.prompt_ids.tolist() == other.request.prompt_ids.tolist()
    assert len(question.plan_at(8.0).schedule(Served("m", 1000)).arrivals) == 80


def question_of(**changed: Any) -> Question:
    given: dict[str, Any] = {
        "plan": Plan(num_prompts=20),
        "objectives": Objectives(TTFT),
        "workers": 2,
        "step_tokens": (64,),
    }
    return Question(**{**given, **changed})


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"workers": 1}, "--workers must be in [2, 16], not 1"),
        ({"target": 1.0}, "--attainment must be between 0 and 1"),
        ({"resolution": 0.0}, "--resolution must be in [0.01, 1]"),
        ({"min_seconds": math.inf}, "--min-seconds must be"),
        ({"draws": 0}, "--draws must be in [1, 100], not 0"),
        ({"start_rps": 0.0}, "--start-rate must be a number above 0"),
        ({"time_limit_s": math.nan}, "--time-limit must be a number above 0"),
        ({"objectives": Objectives({"tpot": 50})}, "--goodput must limit ttft or e2el"),
        ({"objectives": Objectives()}, "--goodput must limit ttft or e2el"),
        ({"plan": Plan(num_prompts=9)}, "--num-prompts must be 10 or more"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_name(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        question_of(**changed)
    assert words in caught.value.message


def test_step_budgets() -> None:
    assert parse_step_tokens("32, 128,512") == (32, 128, 512)
    for wrong in ("", "0", "32,32", "a", "1e3", str(1 << 21)):
        with pytest.raises(ConfigError, match="--step-tokens takes"):
            parse_step_tokens(wrong)


def test_cpu_seconds_of_a_process_and_of_none() -> None:
    first = cpu_seconds(os.getpid())
    assert first is not None
    busy_until = time.process_time() + 0.05
    while time.process_time() < busy_until:
        pass
    later = cpu_seconds(os.getpid())
    assert later is not None
    assert 0.03 < later - first < 5
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
        assert cpu_seconds(gone.pid) is None
        assert cores_of(gone.pid) == []


@pytest.mark.alone
def test_what_others_do_is_counted_on_these_cores() -> None:
    """A process that is no child of ours: its parent has ended."""
    cores = usable_cores()
    first = others_cpu_seconds(cores)
    orphan = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]])"
    burn = "import time\nwhile time.process_time() < 0.5: pass"
    subprocess.run([sys.executable, "-c", orphan, burn], check=True, timeout=30)
    assert first is not None
    wait_until(lambda: (others_cpu_seconds(cores) or 0) - first >= 0.4, 30, "the orphan's CPU seconds")
