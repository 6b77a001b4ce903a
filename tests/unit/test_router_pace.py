"""Paces are what was measured, follow what changes, and refuse only what would come too late."""

from __future__ import annotations

import random
from statistics import fmean

import pytest
from manual_clock import ManualClock

from router.pool.pace import STALE_S, Ahead, DecodePace, OutputShare, PrefillPace, check_deadline
from tandem.errors import Overloaded


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def prefill(clock: ManualClock) -> PrefillPace:
    return PrefillPace(clock)


@pytest.fixture
def decode(clock: ManualClock) -> DecodePace:
    return DecodePace(clock)


def compute(pace: PrefillPace, clock: ManualClock, tokens: int, seconds: float) -> None:
    """After another one, and before another one."""
    if "next" not in pace._sent:
        pace.sent("next", 1)
        pace.sent("first", 1)
        clock.now_s += seconds
        pace.computed("first")
    pace.sent("r", tokens)
    clock.now_s += seconds
    pace.computed("r")


def finish(pace: PrefillPace) -> None:
    pace.dropped("next")


def step(pace: DecodePace, clock: ManualClock, answers: int, seconds: float, times: int = 1) -> None:
    for _ in range(times):
        clock.now_s += seconds
        pace.stepped(answers, answers)


def test_nothing_is_known_at_first(prefill: PrefillPace, decode: DecodePace) -> None:
    assert (prefill.seconds(1000), decode.gap_s(10)) == (0, 0)


def test_a_prompt_takes_what_prompts_took(prefill: PrefillPace, clock: ManualClock) -> None:
    for tokens in (100, 50, 200):
        compute(prefill, clock, tokens, tokens / 100)
    finish(prefill)
    assert prefill.seconds(30) == pytest.approx(0.3)


def test_time_without_prompts_does_not_count(prefill: PrefillPace, clock: ManualClock) -> None:
    for _ in range(5):
        compute(prefill, clock, 100, 1.0)
        finish(prefill)
        clock.now_s += STALE_S / 2
    assert prefill.seconds(100) == pytest.approx(1.0, rel=0.02)


def test_prompts_that_end_together_are_one_measurement(prefill: PrefillPace, clock: ManualClock) -> None:
    for name in "abcdefghi":
        prefill.sent(name, 100)
    for step in ("abc", "def", "ghi"):
        clock.now_s += 3
        for name in step:
            prefill.computed(name)
    assert prefill.seconds(100) == pytest.approx(1.0)


def test_quick_prompts_are_followed_too(prefill: PrefillPace, clock: ManualClock) -> None:
    for seconds in (0.001, 0.004):
        for _ in range(1000):
            compute(prefill, clock, 1, seconds)
        finish(prefill)
        assert prefill.seconds(1) == pytest.approx(seconds, rel=0.05)


def test_a_slow_phase_is_forgotten_soon(prefill: PrefillPace, clock: ManualClock) -> None:
    for _ in range(10):
        compute(prefill, clock, 100, 10.0)
    for _ in range(16):
        compute(prefill, clock, 100, 0.1)
    finish(prefill)
    assert prefill.seconds(100) < 0.11


def test_one_prompt_alone_tells_only_that_the_worker_is_faster(prefill: PrefillPace, clock: ManualClock) -> None:
    """Its time holds what is no work, and more of them may take no longer."""

    def alone(seconds: float) -> None:
        prefill.sent("alone", 100)
        clock.now_s += seconds
        prefill.computed("alone")

    alone(1.0)
    assert prefill.seconds(100) == 0
    compute(prefill, clock, 100, 0.5)
    finish(prefill)
    alone(1.0)
    assert prefill.seconds(100) == pytest.approx(0.5)
    for _ in range(20):
        alone(0.1)
    assert prefill.seconds(100) < 0.11


def test_what_nobody_measures_is_not_known(prefill: PrefillPace, decode: DecodePace, clock: ManualClock) -> None:
    compute(prefill, clock, 100, 10.0)
    finish(prefill)
    step(decode, clock, 4, 1.0, times=5)
    decode.stepped(4, 0)
    clock.now_s += STALE_S + 1
    assert (prefill.seconds(1000), decode.gap_s(10)) == (0, 0)
    compute(prefill, clock, 100, 0.1)
    finish(prefill)
    assert prefill.seconds(100) == pytest.approx(0.1), "nor does it count after"


def test_a_stuck_worker_is_slow_before_its_prompt_ends(prefill: PrefillPace, clock: ManualClock) -> None:
    compute(prefill, clock, 100, 1.0)
    finish(prefill)
    prefill.sent("long", 399)
    prefill.sent("short", 1)
    clock.now_s += 4
    assert prefill.seconds(100) == pytest.approx(1.0), "as long as these take"
    clock.now_s += 36
    assert prefill.seconds(100) == pytest.approx(10.0)
    assert prefill.seconds(4000) == pytest.approx(40.0), "no more than that is known of those who come later"


def test_what_is_dropped_is_no_longer_ahead(prefill: PrefillPace) -> None:
    for name, tokens in (("a", 10), ("b", 20), ("c", 30)):
        prefill.sent(name, tokens)
    prefill.computed("a")
    prefill.dropped("b")
    prefill.dropped("a")
    assert prefill.queued_tokens == 30


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_gap_follows_the_number_of_answers(decode: DecodePace, clock: ManualClock, share: float) -> None:
    """share: of a gap that comes with each answer: none, or all of it."""
    for answers in (1, 2, 4, 8) * 20:
        decode.stepped(0, answers)  # their number changes
        step(decode, clock, answers, 0.1 * answers**share)
    assert decode.gap_s(4) == pytest.approx(0.1 * 4**share, rel=0.1)
    assert decode.gap_s(16) == pytest.approx(0.1 * 16**share, rel=0.15)


def test_a_gap_whose_cause_is_not_known_stays(decode: DecodePace, clock: ManualClock) -> None:
    step(decode, clock, 8, 0.1, times=50)
    assert decode.gap_s(8) == decode.gap_s(16) == pytest.approx(0.1)


def test_a_slow_phase_of_decoding_is_forgotten_soon(decode: DecodePace, clock: ManualClock) -> None:
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


@pytest.mark.parametrize("seed", range(3))
def test_answers_that_are_cut_make_the_share_neither_smaller_nor_larger(seed: int) -> None:
    """Lengths without memory, with a mean of 100 tokens, of which most are cut at 50."""
    chance, output, seen = random.Random(seed), OutputShare(), []
    for _ in range(20_000):
        length, cut_at = 1 + int(chance.expovariate(1 / 99.5)), chance.choice([50, 50, 50, 5000])
        output.ended(min(length, cut_at), 1000 if length <= cut_at else 0)
        seen.append(output.expected(1000))
    assert fmean(seen) == pytest.approx(100, rel=0.1)


def test_answers_of_which_none_ended_by_itself_are_expected_to_be_as_long_as_they_may() -> None:
    output = OutputShare()
    output.ended(0, 0)
    assert output.expected(500) == 0, "one that had no token says nothing"
    for _ in range(500):
        output.ended(10, 0)
    assert output.expected(500) == 500


def ahead(prefill: PrefillPace, decode: DecodePace, placed: int = 1, missing: float = 0.0) -> Ahead:
    return Ahead(prefill, decode, placed=placed, decoding=placed, missing=missing)


def test_what_comes_too_late_is_refused_and_told_by_how_much(
    prefill: PrefillPace, decode: DecodePace, clock: ManualClock
) -> None:
    compute(prefill, clock, 100, 1.0)
    finish(prefill)
    prefill.sent("before", 400)
    check_deadline(ahead(prefill, decode), 100, 1, 1, remaining_s=7.0)
    with pytest.raises(Overloaded, match=r"take about 6 s; its deadline is in 4 s") as caught:
        check_deadline(ahead(prefill, decode), 100, 1, 1, remaining_s=4.0)
    assert caught.value.retry_after_ms == 2000
    check_deadline(ahead(prefill, decode), 1, 1, 1, remaining_s=5.5)  # a short one may still come in time


def test_each_answer_costs(prefill: PrefillPace, decode: DecodePace, clock: ManualClock) -> None:
    compute(prefill, clock, 100, 1.0)
    finish(prefill)
    prefill.sent("before", 1)
    check_deadline(ahead(prefill, decode), 100, 1, 1, remaining_s=4.0)
    with pytest.raises(Overloaded):
        check_deadline(ahead(prefill, decode), 100, 1, 8, remaining_s=4.0)


def test_output_and_blocks_count(prefill: PrefillPace, decode: DecodePace, clock: ManualClock) -> None:
    step(decode, clock, 8, 0.1, times=50)
    check_deadline(ahead(prefill, decode), 1, 21, 1, remaining_s=2.5)
    with pytest.raises(Overloaded):
        check_deadline(ahead(prefill, decode), 1, 41, 1, remaining_s=2.5)
    with pytest.raises(Overloaded):
        check_deadline(ahead(prefill, decode, missing=0.5), 1, 21, 1, remaining_s=2.5)


def test_with_nothing_ahead_nothing_is_refused(prefill: PrefillPace, decode: DecodePace, clock: ManualClock) -> None:
    compute(prefill, clock, 100, 1000.0)
    finish(prefill)
    check_deadline(ahead(prefill, decode, placed=0), 100, 1, 1, remaining_s=0.1)


def test_one_that_waited_too_long_is_not_computed(prefill: PrefillPace, clock: ManualClock) -> None:
    compute(prefill, clock, 100, 1.0)
    finish(prefill)
    prefill.sent("other", 1)
    prefill.check(100, 1.5)
    with pytest.raises(Overloaded):
        prefill.check(100, 0.5)
