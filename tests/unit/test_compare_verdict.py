"""What a comparison says in words: whether splitting pays, by how much, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from loadtest.compare.model import Measured, Run, ServiceShape, Verdict, WorkerUse
from loadtest.compare.verdict import LEAST_DRAWS, common_rate, verdict_on

SPLIT, MIXED = ServiceShape(prefill=1, decode=1, step_tokens=512), ServiceShape(colocated=2, step_tokens=64)


def probe(rate_rps: float, attainment: float, **missed: int) -> Run:
    use = [WorkerUse(worker="w", pool="prefill", cores=[0], busy=0.5)]
    return Run(
        rate_rps=rate_rps,
        duration_s=40,
        offered=40,
        failed=0,
        attainment=attainment,
        goodput_rps=rate_rps * attainment,
        figures={"missed": missed},
        use=use,
    )


def measured(shape: ServiceShape, *probes: Run, draws: Sequence[int] = ()) -> Measured:
    """draws: of 40 requests, how many were good, at 1.5 requests/s."""
    best = max((run for run in probes if run.attainment >= 0.9), key=lambda run: run.rate_rps, default=None)
    return Measured(
        shape=shape,
        probes=list(probes),
        best_rate_rps=best.rate_rps if best else 0.0,
        missed_rate_rps=min((run.rate_rps for run in probes if run.attainment < 0.9), default=None),
        draws=[probe(1.5, good / 40) for good in draws],
        shown=[],
    )


def compared(split: Sequence[int], mixed: Sequence[int], interrupted: bool = False) -> Verdict:
    found = [
        measured(MIXED, probe(1.0, 0.95), probe(1.1, 0.8, tpot=8, ttft=1), draws=mixed),
        measured(SPLIT, probe(2.0, 0.95), probe(2.2, 0.5, ttft=20), draws=split),
    ]
    return verdict_on(found, 0.9, interrupted)


def test_it_pays_when_every_draw_says_so_and_by_the_interval() -> None:
    verdict = compared([36, 30, 40, 33, 39], [18, 20, 32, 30, 20])
    assert verdict.outcome == "pays"
    assert (verdict.lowest, verdict.median, verdict.highest) == pytest.approx((1.1, 1.5, 2.0))
    assert [pair.ratio for pair in verdict.pairs] == pytest.approx([2.0, 1.5, 1.25, 1.1, 1.95])
    assert verdict.rate_rps == 1.5
    assert verdict.text[0] == (
        "Splitting pays here, 1.10 to 2.00 times the good answers: of 40 requests in each of 5 draws of arrivals, "
        "offered to both by turns at 1.50 requests/s, 1P1D met the objectives for 36, 30, 40, 33 and 39, "
        "2 colocated, 64-token steps for 18, 20, 32, 30 and 20; the median ratio is 1.50."
    )
    text = "\n".join(verdict.text)
    assert "of 40 requests offered until then 8 missed TPOT and 1 missed TTFT" in text
    assert "1P1D kept 2.00 requests/s and missed 2.20" in text
    assert "the prefill pool was 50% busy" in text
    assert "on one side of 1 in one of 16 comparisons" in text


def test_it_costs_when_every_draw_says_so() -> None:
    verdict = compared([20, 30, 30, 30, 36], [40] * 5)
    assert verdict.outcome == "costs"
    assert verdict.text[0].startswith("Splitting does not pay here, it gives 0.50 to 0.90 times the good answers: ")


@pytest.mark.parametrize("other", [40, 39])
def test_one_draw_that_says_otherwise_is_too_close_to_tell(other: int) -> None:
    """Whatever the search found: it kept twice the rate with the split."""
    verdict = compared([40, 40, 40, 40, other], [20, 20, 20, 20, 40])
    assert verdict.outcome == "too close"
    assert verdict.text[0].startswith(
        f"Whether splitting pays cannot be told, it is too close, {other / 40:.2f} to 2.00"
    )


def test_fewer_draws_are_no_verdict() -> None:
    verdict = compared([40] * (LEAST_DRAWS - 1), [20] * (LEAST_DRAWS - 1))
    assert (verdict.outcome, verdict.lowest, verdict.highest) == ("unknown", 2.0, 2.0)
    assert verdict.text[0].startswith("Whether splitting pays cannot be told from so few draws, 2.00 to 2.00 times")


def test_a_draw_that_only_one_of_them_got_is_no_pair() -> None:
    assert len(compared([40, 40, 40], [20, 20]).pairs) == 2
    verdict = compared([40], [])
    assert (verdict.outcome, verdict.lowest, verdict.pairs) == ("unknown", None, [])
    assert verdict.text[0] == "Whether splitting pays cannot be told: no draw of arrivals was offered to both kinds."


def test_without_a_good_answer_there_is_no_bound() -> None:
    verdict = compared([40, 40, 40, 40, 0], [20, 0, 0, 0, 0])
    assert (verdict.outcome, verdict.lowest, verdict.median, verdict.highest) == ("too close", 1.0, None, None)
    assert "1.00 to ∞ times" in verdict.text[0]
    assert compared([1] * 5, [0] * 5).outcome == "pays"


def test_draws_are_compared_between_the_rates_that_were_kept() -> None:
    fast, slow = measured(SPLIT, probe(4.0, 0.95)), measured(MIXED, probe(1.0, 0.95))
    assert common_rate([slow, fast]) == pytest.approx(2.0)
    none = measured(MIXED, probe(3.0, 0.2), probe(0.5, 0.1))
    assert common_rate([none, fast]) == pytest.approx(4.0)
    assert common_rate([none, none]) == 0.5


def test_the_best_colocated_shape_counts() -> None:
    other = ServiceShape(colocated=2, step_tokens=512)
    mixed = [measured(MIXED, probe(1.0, 0.95), probe(1.1, 0.5)), measured(other, probe(1.1, 0.1))]
    verdict = verdict_on([*mixed, measured(SPLIT, probe(3.0, 1.0))], 0.9, interrupted=True)
    assert verdict.best_colocated == MIXED.name
    assert verdict.text[0].startswith("The comparison was cut off")
    assert any(f"{other.name}: did not keep 1.10 requests/s" in sentence for sentence in verdict.text)


def test_a_rival_that_nobody_saw_fail_may_be_better() -> None:
    """The search was cut: the other step budget has missed only what is above the rate of the draws."""
    tried = measured(MIXED, probe(1.0, 0.95), probe(1.1, 0.5), draws=[20] * 5)
    split = measured(SPLIT, probe(2.0, 0.95), probe(2.2, 0.5), draws=[30] * 5)
    for seen, outcome in ([], "unknown"), ([probe(2.0, 0.1)], "unknown"), ([probe(1.5, 0.1)], "pays"):
        rival = measured(ServiceShape(colocated=2, step_tokens=512), *seen)
        verdict = verdict_on([tried, rival, split], 0.9, interrupted=True)
        assert verdict.outcome == outcome
        words = "Splitting pays here" if outcome == "pays" else "Whether splitting pays cannot be told from what was"
        assert verdict.text[1].startswith(words)


def test_who_misses_even_without_load_loses_to_any_rate() -> None:
    alone = measured(MIXED, probe(3.0, 0.0, tpot=3), draws=[0] * 5).model_copy(update={"missed_rate_rps": 0.0})
    split = measured(SPLIT, probe(1.0, 0.95), probe(1.1, 0.5), draws=[38] * 5)
    verdict = verdict_on([alone, split], 0.9, interrupted=False)
    assert verdict.outcome == "pays"
    assert any(f"What limits {MIXED.name}: even without load" in sentence for sentence in verdict.text)


def test_nothing_is_said_of_a_rate_that_nobody_keeps() -> None:
    found = [measured(shape, probe(1.0, 0.2), draws=[good] * 5) for shape, good in ((MIXED, 10), (SPLIT, 20))]
    verdict = verdict_on(found, 0.9, interrupted=False)
    assert verdict.outcome == "unknown"
    assert verdict.text[0].startswith("Nothing can be said of splitting: no shape kept the objectives at any rate")


def broken(shape: ServiceShape, *probes: Run) -> Measured:
    lost = probe(4.0, 0.2).model_copy(
        update={"lost": ["w-1"], "failed": 9, "figures": {"failures": {"worker_lost": 7, "interrupted": 2}}}
    )
    return measured(shape, *probes).model_copy(update={"broken": [lost], "failure": "workers died"})


def test_a_shape_that_failed_takes_no_part_in_the_verdict() -> None:
    split = measured(SPLIT, probe(2.0, 0.95), probe(2.2, 0.5), draws=[40] * 5)
    mixed = measured(MIXED, probe(1.0, 0.95), probe(1.1, 0.5), draws=[20] * 5)
    gone = broken(ServiceShape(colocated=2, step_tokens=512), probe(8.0, 1.0))
    verdict = verdict_on([mixed, gone, split], 0.9, interrupted=False)
    assert (verdict.outcome, verdict.lowest, verdict.best_colocated) == ("pays", pytest.approx(2.0), MIXED.name)
    assert verdict.text[1:3] == [
        f"{gone.shape.name} lost w-1 during a load at 4.00 requests/s: of 40 requests offered until then 7 failed.",
        f"{gone.shape.name} failed and is left out of the comparison: workers died.",
    ]
    assert any(f"{gone.shape.name}: failed." in sentence for sentence in verdict.text)


def test_without_one_kind_there_is_no_verdict() -> None:
    mixed = measured(MIXED, probe(1.0, 0.95), probe(1.1, 0.5))
    verdict = verdict_on([mixed, broken(SPLIT, probe(8.0, 1.0))], 0.9, interrupted=False)
    assert (verdict.outcome, verdict.lowest, verdict.pairs) == ("unknown", None, [])
    assert verdict.text[0] == "Nothing can be said of splitting: no split shape could be measured to the end."
    assert len([sentence for sentence in verdict.text if SPLIT.name in sentence]) == 2


def test_disturbed_loads_are_named_in_the_verdict() -> None:
    loud = probe(1.1, 0.5, tpot=5).model_copy(update={"figures": {"missed": {}, "others_busy": 0.3}})
    verdict = verdict_on([measured(MIXED, probe(1.0, 0.95), loud), measured(SPLIT, probe(1.0, 1.0))], 0.9, False)
    assert any(
        "in 1 of 3 loads other programs took more than 5% of the cores, up to 30%" in each for each in verdict.text
    )
