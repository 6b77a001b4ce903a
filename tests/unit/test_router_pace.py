"""Paces are what was measured, follow what changes, and refuse only what would come too late."""

from __future__ import annotations

import pytest

from router.pace import STALE_S, Ahead, DecodePace, OutputShare, PrefillPace, check_deadline
from tandem.errors import Overloaded


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def prefill(clock: Clock) -> PrefillPace:
    return PrefillPace(clock)


@pytest.fixture
def decode(clock: Clock) -> DecodePace:
    return DecodePace(clock)


def compute(pace: PrefillPace, clock: Clock, tokens: int, seconds: float) -> None:
    pace.placed("r", tokens)
    pace.sent("r")
    clock.now_s += seconds
    pace.computed("r", tokens)


def step(pace: DecodePace, clock: Clock, answers: int, seconds: float, times: int = 1) -> None:
    for _ in range(times):
        clock.now_s += seconds
        pace.stepped(answers, answers)


def test_nothing_is_known_at_first(prefill: PrefillPace, decode: DecodePace) -> None:
    assert (prefill.seconds(1000), decode.gap_s(10)) == (0, 0)


def test_a_prompt_takes_what_prompts_took(prefill: PrefillPace, clock: Clock) -> None:
    for tokens in (100, 50, 200):
        compute(prefill, clock, tokens, tokens / 100)
    assert prefill.seconds(30) == pytest.approx(0.3)


def test_time_without_prompts_does_not_count(prefill: PrefillPace, clock: Clock) -> None:
    for _ in range(5):
        compute(prefill, clock, 100, 1.0)
        clock.now_s += STALE_S / 2
    assert prefill.seconds(100) == pytest.approx(1.0)


def test_prompts_that_end_together_are_one_measurement(prefill: PrefillPace, clock: Clock) -> None:
    for name in "abc":
        prefill.placed(name, 100)
        prefill.sent(name)
    clock.now_s += 3
    for name in "abc":
        prefill.computed(name, 100)
    clock.now_s += 1
    compute(prefill, clock, 100, 1.0)
    assert prefill.seconds(100) == pytest.approx(1.0)


def test_quick_prompts_are_followed_too(prefill: PrefillPace, clock: Clock) -> None:
    for seconds in (0.001, 0.004):
        for _ in range(1000):
            compute(prefill, clock, 1, seconds)
        assert prefill.seconds(1) == pytest.approx(seconds, rel=0.05)


def test_a_slow_phase_is_forgotten_soon(prefill: PrefillPace, clock: Clock) -> None:
    for _ in range(10):
        compute(prefill, clock, 100, 10.0)
    for _ in range(16):
        compute(prefill, clock, 100, 0.1)
    assert prefill.seconds(100) < 0.11


def test_what_nobody_measures_any_more_is_not_known(prefill: PrefillPace, decode: DecodePace, clock: Clock) -> None:
    compute(prefill, clock, 100, 10.0)
    step(decode, clock, 4, 1.0, times=5)
    decode.stepped(4, 0)
    clock.now_s += STALE_S + 1
    assert (prefill.seconds(1000), decode.gap_s(10)) == (0, 0)
    compute(prefill, clock, 100, 0.1)
    assert prefill.seconds(100) == pytest.approx(0.1), "nor does it count after"


def test_a_stuck_worker_is_slow_before_its_prompt_ends(prefill: PrefillPace, clock: Clock) -> None:
    compute(prefill, clock, 100, 1.0)
    prefill.placed("long", 1000)
    prefill.sent("long")
    prefill.placed("short", 1)
    prefill.sent("short")
    clock.now_s += 10
    assert prefill.seconds(100) == pytest.approx(1.0), "as long as 1000 tokens take"
    clock.now_s += 30
    assert prefill.seconds(100) == pytest.approx(4.0)


def test_what_is_dropped_is_no_longer_ahead(prefill: PrefillPace) -> None:
    for name, tokens in (("a", 10), ("b", 20), ("c", 30)):
        prefill.placed(name, tokens)
    prefill.sent("a")
    prefill.computed("a", 10)
    prefill.dropped("b")
    prefill.dropped("a")
    assert prefill.queued_tokens == 30


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_gap_follows_the_number_of_answers(decode: DecodePace, clock: Clock, share: float) -> None:
    """share: of a gap that comes with each answer: none, or all of it."""
    for answers in (1, 2, 4, 8) * 20:
        decode.stepped(0, answers)  # their number changes
        step(decode, clock, answers, 0.1 * answers**share)
    assert decode.gap_s(4) == pytest.approx(0.1 * 4**share, rel=0.1)
    assert decode.gap_s(16) == pytest.approx(0.1 * 16**share, rel=0.15)


def test_a_gap_whose_cause_is_not_known_stays(decode: DecodePace, clock: Clock) -> None:
    step(decode, clock, 8, 0.1, times=50)
    assert decode.gap_s(8) == decode.gap_s(16) == pytest.approx(0.1)


def test_a_slow_phase_of_decoding_is_forgotten_soon(decode: DecodePace, clock: Clock) -> None:
    step(decode, clock, 8, 5.0, times=100)
    step(decode, clock, 8, 0.05, times=300)
    assert decode.gap_s(8) < 0.06


def test_answers_are_expected_to_be_as_long_as_lately() -> None:
    output = OutputShare()
    assert output.expected(500) == 0
    for _ in range(500):
        output.ended(50, 500)
    assert output.expected(1000) == pytest.approx(100)
    for _ in range(500):
        output.ended(10, 10)
    assert output.expected(20) == pytest.approx(20, rel=0.1)


def ahead(prefill: PrefillPace, decode: DecodePace, placed: int = 1, missing: float = 0.0) -> Ahead:
    return Ahead(prefill, decode, placed=placed, decoding=placed, missing=missing)


def test_what_comes_too_late_is_refused_and_told_by_how_much(
    prefill: PrefillPace, decode: DecodePace, clock: Clock
) -> None:
    compute(prefill, clock, 100, 1.0)
    prefill.placed("before", 400)
    check_deadline(ahead(prefill, decode), 100, 1, 1, remaining_s=7.0)
    with pytest.raises(Overloaded, match=r"take about 6 s; its deadline is in 4 s") as caught:
        check_deadline(ahead(prefill, decode), 100, 1, 1, remaining_s=4.0)
    assert caught.value.retry_after_ms == 2000
    check_deadline(ahead(prefill, decode), 1, 1, 1, remaining_s=5.5)  # a short one may still come in time


def test_each_answer_costs(prefill: PrefillPace, decode: DecodePace, clock: Clock) -> None:
    compute(prefill, clock, 100, 1.0)
    prefill.placed("before", 1)
    check_deadline(ahead(prefill, decode), 100, 1, 1, remaining_s=4.0)
    with pytest.raises(Overloaded):
        check_deadline(ahead(prefill, decode), 100, 1, 8, remaining_s=4.0)


def test_output_and_blocks_count(prefill: PrefillPace, decode: DecodePace, clock: Clock) -> None:
    step(decode, clock, 8, 0.1, times=50)
    check_deadline(ahead(prefill, decode), 1, 21, 1, remaining_s=2.5)
    with pytest.raises(Overloaded):
        check_deadline(ahead(prefill, decode), 1, 41, 1, remaining_s=2.5)
    with pytest.raises(Overloaded):
        check_deadline(ahead(prefill, decode, missing=0.5), 1, 21, 1, remaining_s=2.5)


def test_with_nothing_ahead_nothing_is_refused(prefill: PrefillPace, decode: DecodePace, clock: Clock) -> None:
    compute(prefill, clock, 100, 1000.0)
    check_deadline(ahead(prefill, decode, placed=0), 100, 1, 1, remaining_s=0.1)


def test_one_that_waited_too_long_is_not_computed(prefill: PrefillPace, clock: Clock) -> None:
    compute(prefill, clock, 100, 1.0)
    prefill.placed("other", 1)
    prefill.sent("other")
    prefill.placed("late", 100)
    prefill.check("late", 1.5)
    with pytest.raises(Overloaded):
        prefill.check("late", 0.5)
