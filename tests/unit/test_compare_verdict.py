"""What a comparison says in words: whether splitting pays, by how much, and how sure that is."""

from __future__ import annotations

import pytest

from loadtest.compare.model import Measured, Run, Shape, ShownRun, WorkerUse
from loadtest.compare.verdict import verdict_on

SPLIT, MIXED = Shape(prefill=1, decode=1, step_tokens=512), Shape(colocated=2, step_tokens=64)


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


def measured(shape: Shape, *probes: Run) -> Measured:
    best = max((run for run in probes if run.attainment >= 0.9), key=lambda run: run.rate_rps, default=None)
    return Measured(
        shape=shape,
        probes=list(probes),
        best_rate_rps=best.rate_rps if best else 0.0,
        goodput_rps=best.goodput_rps if best else 0.0,
        missed_rate_rps=min((run.rate_rps for run in probes if run.attainment < 0.9), default=None),
        shown=[],
    )


def test_it_pays_by_the_ratio_of_goodput() -> None:
    split = measured(SPLIT, probe(2.0, 0.95), probe(2.2, 0.5, ttft=20))
    mixed = measured(MIXED, probe(1.0, 0.95), probe(1.1, 0.8, tpot=8, ttft=1))
    verdict = verdict_on([mixed, split], 0.9, interrupted=False)
    assert (verdict.pays, verdict.ratio) == (True, pytest.approx(2.0))
    text = "\n".join(verdict.text)
    assert "Splitting pays here, 2.00 times" in text
    assert "of 40 requests offered until then 8 missed TPOT and 1 missed TTFT" in text
    assert "within 2.00 requests/s and 2.20" in text
    assert "the prefill pool was 50% busy" in text


def test_it_does_not_pay_and_by_how_much() -> None:
    split = measured(SPLIT, probe(1.0, 0.95), probe(1.1, 0.5, ttft=20))
    mixed = measured(MIXED, probe(2.0, 0.95), probe(2.2, 0.8, tpot=8))
    verdict = verdict_on([mixed, split], 0.9, interrupted=False)
    assert (verdict.pays, verdict.ratio) == (False, pytest.approx(0.5))
    assert "Splitting does not pay here, it costs 50% of the goodput (0.50 times)" in verdict.text[0]


def test_what_the_search_cannot_tell_apart_is_no_difference() -> None:
    split = measured(SPLIT, probe(1.05, 0.95), probe(1.15, 0.5))
    mixed = measured(MIXED, probe(1.0, 0.95), probe(1.1, 0.8))
    verdict = verdict_on([mixed, split], 0.9, interrupted=False)
    assert not verdict.pays
    assert "no difference that this search can tell (1.05 times)" in verdict.text[0]


def test_the_best_colocated_shape_counts() -> None:
    other = Shape(colocated=2, step_tokens=512)
    mixed = [measured(MIXED, probe(1.0, 0.95), probe(1.1, 0.5)), measured(other, probe(1.1, 0.1))]
    verdict = verdict_on([*mixed, measured(SPLIT, probe(3.0, 1.0))], 0.9, interrupted=True)
    assert verdict.best_colocated == MIXED.name
    assert verdict.text[0].startswith("The comparison was cut off")
    assert any(f"{other.name}: did not keep 1.10 requests/s" in sentence for sentence in verdict.text)


def test_a_rival_that_nobody_saw_fail_may_be_better() -> None:
    """The search was cut: the other step budget has missed only what is above the best rate of the split."""
    tried = measured(MIXED, probe(1.0, 0.95), probe(1.1, 0.5))
    split = measured(SPLIT, probe(1.5, 0.95), probe(1.6, 0.5))
    for seen, pays in ([], False), ([probe(2.0, 0.1)], False), ([probe(1.5, 0.1)], True):
        rival = measured(Shape(colocated=2, step_tokens=512), *seen)
        verdict = verdict_on([tried, rival, split], 0.9, interrupted=True)
        assert verdict.pays is pays
        words = "Splitting pays here" if pays else "Whether splitting pays cannot be told from what was found"
        assert verdict.text[1].startswith(words)


def test_a_best_rate_that_other_arrivals_do_not_confirm_is_said_so() -> None:
    split = measured(SPLIT, probe(2.0, 0.95), probe(2.2, 0.5))
    mixed = measured(MIXED, probe(1.0, 0.95), probe(1.1, 0.5))
    for share, said in ((0.9, False), (0.4, True)):
        again = [ShownRun(**probe(rate, share).model_dump(), answers=[]) for rate in (1.0, 2.0)]
        verdict = verdict_on([mixed, split.model_copy(update={"shown": again})], 0.9, interrupted=False)
        assert any("1P1D did not keep its own best rate" in sentence for sentence in verdict.text) is said


@pytest.mark.parametrize(("split", "mixed"), [(1.0, 0.0), (0.0, 1.0)])
def test_a_cut_search_says_nothing_of_those_who_missed_higher_rates_only(split: float, mixed: float) -> None:
    found = [measured(shape, probe(2.0 - share, share)) for shape, share in ((MIXED, mixed), (SPLIT, split))]
    verdict = verdict_on(found, 0.9, interrupted=True)
    assert not verdict.pays
    assert verdict.text[1].startswith("Whether splitting pays cannot be told from what was found until then: ")


def test_who_misses_even_without_load_loses_to_any_rate() -> None:
    alone = measured(MIXED, probe(3.0, 0.0, tpot=3)).model_copy(update={"missed_rate_rps": 0.0})
    verdict = verdict_on([alone, measured(SPLIT, probe(1.0, 0.95), probe(1.1, 0.5))], 0.9, interrupted=False)
    assert verdict.pays
    assert any(f"What limits {MIXED.name}: even without load" in sentence for sentence in verdict.text)


@pytest.mark.parametrize(
    ("split", "mixed", "pays", "words"),
    [
        (0.0, 0.0, False, "Nothing can be said of splitting"),
        (1.0, 0.0, True, "colocated workers kept the objectives at no rate"),
        (0.0, 1.0, False, "no split shape kept the objectives"),
    ],
)
def test_who_keeps_no_rate(split: float, mixed: float, pays: bool, words: str) -> None:
    found = [measured(shape, probe(1.0, share)) for shape, share in ((MIXED, mixed), (SPLIT, split))]
    verdict = verdict_on(found, 0.9, interrupted=False)
    assert verdict.pays is pays
    assert words in verdict.text[0]
    assert (verdict.ratio is None) == (mixed == 0)


def broken(shape: Shape, *probes: Run) -> Measured:
    lost = probe(4.0, 0.2).model_copy(
        update={"lost": ["w-1"], "failed": 9, "figures": {"failures": {"worker_lost": 7, "interrupted": 2}}}
    )
    return measured(shape, *probes).model_copy(update={"broken": [lost], "failure": "workers died"})


def test_a_shape_that_failed_takes_no_part_in_the_verdict() -> None:
    split = measured(SPLIT, probe(2.0, 0.95), probe(2.2, 0.5))
    mixed = measured(MIXED, probe(1.0, 0.95), probe(1.1, 0.5))
    gone = broken(Shape(colocated=2, step_tokens=512), probe(8.0, 1.0))
    verdict = verdict_on([mixed, gone, split], 0.9, interrupted=False)
    assert (verdict.pays, verdict.ratio, verdict.best_colocated) == (True, pytest.approx(2.0), MIXED.name)
    assert verdict.text[1:3] == [
        f"{gone.shape.name} lost w-1 during a load at 4.00 requests/s: of 40 requests offered until then 7 failed.",
        f"{gone.shape.name} failed and is left out of the comparison: workers died.",
    ]
    assert any(f"{gone.shape.name}: failed." in sentence for sentence in verdict.text)


def test_without_one_kind_there_is_no_verdict() -> None:
    mixed = measured(MIXED, probe(1.0, 0.95), probe(1.1, 0.5))
    verdict = verdict_on([mixed, broken(SPLIT, probe(8.0, 1.0))], 0.9, interrupted=False)
    assert (verdict.pays, verdict.ratio) == (False, None)
    assert verdict.text[0] == "Nothing can be said of splitting: no split shape could be measured to the end."
    assert len([sentence for sentence in verdict.text if SPLIT.name in sentence]) == 2


def test_disturbed_loads_are_named_in_the_verdict() -> None:
    loud = probe(1.1, 0.5, tpot=5).model_copy(update={"figures": {"missed": {}, "others_busy": 0.3}})
    verdict = verdict_on([measured(MIXED, probe(1.0, 0.95), loud), measured(SPLIT, probe(1.0, 1.0))], 0.9, False)
    assert any(
        "in 1 of 3 loads other programs took more than 5% of the cores, up to 30%" in each for each in verdict.text
    )
