"""The comparison against services whose capacity a test writes down: real sockets, no model."""

from __future__ import annotations

import asyncio
import itertools
import math
from typing import Any

import pytest
from scripted_comparison import OUTPUT, Line, Notes, Scripted, compared, question

from loadtest.compare import contender, model
from loadtest.compare.comparing import TRIES, NothingFound
from loadtest.compare.contender import ALONE_AS_MEASURE, Alone, Contender, Ending
from loadtest.objectives import Objectives
from loadtest.schedule.plan import Plan
from loadtest.schedule.workloads import Lengths
from tandem.errors import ConfigError, DeadlineExceeded, Overloaded, Unavailable

# Those that say how many requests were good, and when.
alone = pytest.mark.alone


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """What else runs on this machine is not to repeat loads here."""
    monkeypatch.setattr(contender, "others_cpu_seconds", lambda cores: 0.0)


@alone
async def test_the_faster_shape_wins_by_about_what_it_is_faster() -> None:
    found, notes = await compared(Scripted(colocated_s=0.04, split_s=0.01), question(draws=5))
    colocated, split = found.measured
    # 25 and 100 requests a second, for ever; for a short time a little more, for a queue of 250 ms may be left over.
    assert 10 < colocated.best_rate_rps < 40
    assert 40 < split.best_rate_rps < 160
    assert found.verdict.outcome == "pays"
    assert found.verdict.lowest is not None
    assert 1.2 < found.verdict.lowest <= min(pair.ratio for pair in found.verdict.pairs)
    assert not found.interrupted
    searched, drawn = notes.loads[:-10], notes.loads[-10:]
    names = [each.shape.name for each in found.measured]
    assert [name for name, _, _ in searched[:4]] == [*names, *reversed(names)]
    assert Ending.HOPELESS in [ending for _, _, ending in searched]
    # Draw by draw, by turns, at one rate between the two, to the end.
    assert [name for name, _, _ in drawn] == [*names, *names[::-1], *names, *names[::-1], *names]
    assert {ending for _, _, ending in drawn} == {Ending.WHOLE}
    (rate_rps,) = {run.rate_rps for _, run, _ in drawn}
    assert rate_rps == pytest.approx(math.sqrt(colocated.best_rate_rps * split.best_rate_rps))
    assert [pair.split_good for pair in found.verdict.pairs] == [
        round(run.attainment * run.offered) for run in split.draws
    ]


@alone
async def test_equal_shapes_are_too_close_to_tell() -> None:
    """Both keep every request of every draw."""
    found, _ = await compared(
        Scripted(0.001, 0.001), question(plan=Plan(num_prompts=10, lengths=Lengths(8, OUTPUT)), min_seconds=0, draws=5)
    )
    assert found.verdict.outcome == "too close"
    assert "too close, 1.00 to 1.00 times" in found.verdict.text[0]


@pytest.fixture(scope="module")
def slower_split() -> tuple[model.Comparison, Notes, Scripted]:
    """One comparison, of which several tests look at something else."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(contender, "others_cpu_seconds", lambda cores: 0.0)
        scripted = Scripted(colocated_s=0.01, split_s=0.02)
        return (*asyncio.run(compared(scripted, question(resolution=1.0))), scripted)


@alone
def test_draws_have_the_same_arrivals_and_the_first_keeps_every_answer(
    slower_split: tuple[model.Comparison, Notes, Scripted],
) -> None:
    found, _, _ = slower_split
    assert found.verdict.outcome == "unknown", "one draw decides nothing"
    assert len({run.rate_rps for each in found.measured for run in [*each.draws, *each.shown]}) == 1
    due = [[round(answer.scheduled_s, 6) for answer in each.shown[0].answers] for each in found.measured]
    assert due[0] == due[1]
    for each in found.measured:
        (run,) = each.shown
        assert run.model_dump(exclude={"answers"}) == each.draws[0].model_dump()
        assert len(run.answers) == run.offered
        assert sum(answer.met for answer in run.answers) / run.offered == pytest.approx(run.attainment)
        assert all(answer.decode_worker == "decode-b" for answer in run.answers)
        assert run.answers[0].scheduled_s <= run.answers[0].sent_s <= run.answers[0].arrivals_s[0]


@alone
def test_no_load_finds_what_another_left_in_a_cache(slower_split: tuple[model.Comparison, Notes, Scripted]) -> None:
    _, notes, scripted = slower_split
    for name, router in scripted.routers.items():
        salts = [request.cache_salt for request in router.requests]
        assert "" not in salts
        # Every load its own, and so have the warm-up and the requests that were alone.
        assert len(set(salts)) == 2 + len([load for load in notes.loads if load[0] == name])


@alone
def test_the_comparison_reads_back_what_it_wrote(slower_split: tuple[model.Comparison, Notes, Scripted]) -> None:
    found, _, _ = slower_split
    assert model.Comparison.model_validate_json(found.model_dump_json()) == found


@alone
async def test_a_shape_that_is_too_slow_even_alone_is_not_searched() -> None:
    found, _ = await compared(
        Scripted(colocated_s=0.12, split_s=0.01), question(resolution=1.0, objectives=Objectives({"ttft": 100.0}))
    )
    colocated = found.measured[0]
    assert (colocated.best_rate_rps, len(colocated.probes), colocated.probes[0].attainment) == (0, 1, 0)
    assert colocated.missed_rate_rps == 0
    assert colocated.probes[0].figures["missed"] == {"ttft": 3}
    assert found.verdict.rate_rps == found.measured[1].best_rate_rps
    assert [(pair.colocated_good, pair.split_good > 0) for pair in found.verdict.pairs] == [(0, True)]


@alone
async def test_objectives_in_times_of_what_the_fastest_shape_takes_alone() -> None:
    asked = question(
        plan=Plan(num_prompts=10, lengths=Lengths(8, OUTPUT)),
        objectives=Objectives({"e2el": 900.0}, {"ttft": 6.0}),
        min_seconds=0.0,
        resolution=1.0,
    )
    found, notes = await compared(Scripted(colocated_s=0.3, split_s=0.02), asked)
    assert found.times_alone == {"ttft": 6.0}
    assert notes.limits_ms == [found.objectives]
    assert 120 < found.objectives["ttft"] < 6 * 50, "of the split shape"
    assert found.objectives["e2el"] == 900
    colocated = found.measured[0]
    assert [run.figures["goodput"] for run in colocated.draws] == [found.objectives]
    assert (colocated.missed_rate_rps, colocated.probes[0].figures["missed"]) == (0, {"ttft": ALONE_AS_MEASURE})


async def test_a_stop_while_the_last_shape_is_alone_reports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not requests that it interrupted as missed ones."""
    real = Contender.alone

    async def alone(self: Contender, plan: Plan, count: int, stop: asyncio.Event) -> Alone:
        if self.shape.is_split:
            stop.set()
        return await real(self, plan, count, stop)

    monkeypatch.setattr(Contender, "alone", alone)
    scripted = Scripted(0.02, 0.02)
    with pytest.raises(NothingFound):
        await compared(scripted, question(objectives=Objectives({}, {"ttft": 6.0})))


async def test_a_load_that_the_model_cannot_take_is_told_once() -> None:
    scripted = Scripted(0.02, 0.02)
    with pytest.raises(ConfigError, match="longer than the model's 4096 tokens"):
        await compared(scripted, question(plan=Plan(num_prompts=20, lengths=Lengths(5000, OUTPUT))))
    assert len(scripted.routers) == 1, "no other service is started for it"


async def test_what_all_shapes_fail_for_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(_line: Line, _request: Any, _emit: Any) -> None:
        raise Overloaded("full")

    told: list[str] = []
    monkeypatch.setattr(Line, "answer", refuse)
    monkeypatch.setattr(Notes, "report_failed", lambda _notes, shape, _why: told.append(shape.name))
    with pytest.raises(Unavailable, match="no warm-up request was answered"):
        await compared(Scripted(0.02, 0.02), question())
    assert told == []


async def test_stopped_in_the_search_it_says_what_was_found() -> None:
    found, notes = await compared(Scripted(0.02, 0.02), question(), stop_after=2)
    assert notes.loads[2][2] is Ending.CUT
    assert found.interrupted
    assert [len(each.probes) for each in found.measured] == [1, 1]
    assert len(notes.loads) == 3, "nothing is offered after it"
    assert found.measured[0].draws == found.measured[0].shown == []


async def test_stopped_before_anything_was_found() -> None:
    with pytest.raises(NothingFound):
        await compared(Scripted(0.02, 0.02), question(), stop_after=0)


async def test_a_time_limit_too_short_for_any_load_is_said_so() -> None:
    with pytest.raises(DeadlineExceeded, match=r"--time-limit 0\.01 was over before a load had ended"):
        await compared(Scripted(0.02, 0.02), question(time_limit_s=0.01))


@alone
async def test_a_time_limit_ends_the_search_and_leaves_time_for_what_is_shown() -> None:
    found, notes = await compared(Scripted(0.02, 0.04), question(resolution=0.01, min_seconds=1.0, time_limit_s=5))
    assert found.interrupted
    cut_at = [ending for _, _, ending in notes.loads].index(Ending.CUT)
    assert len({run.rate_rps for _, run, _ in notes.loads[cut_at + 1 :]}) == 1, "the search goes no further"
    assert any(each.draws for each in found.measured)


@alone
async def test_a_load_that_others_disturbed_is_repeated_unless_it_was_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = itertools.count(0.0, 5.0)
    monkeypatch.setattr(contender, "others_cpu_seconds", lambda cores: next(seconds))
    found, notes = await compared(Scripted(0.01, 0.01), question(resolution=1.0))
    for each in found.measured:
        kept: dict[float, list[bool]] = {}
        for name, run, _ in notes.loads:
            if name == each.shape.name:
                kept.setdefault(run.rate_rps, []).append(run.attainment >= 0.9)
        # On a busy machine one that was missed may be kept when it is repeated.
        assert all(any(tries) or len(tries) >= TRIES for tries in kept.values())
        assert max(map(len, kept.values())) >= TRIES
    assert any("The machine was not quiet" in sentence for sentence in found.verdict.text)


@alone
async def test_a_worker_that_does_not_come_back_takes_its_shape_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contender, "READY_S", 0.5)
    scripted = Scripted(0.02, 0.02)

    def lose(shape: str) -> None:
        if shape == "1P1D":
            del scripted.routers[shape].status.workers[1:]

    found, notes = await compared(scripted, question(), at_load=lose)
    colocated, split = found.measured
    assert (colocated.failure, split.failure) == (None, "nothing took the place of w-1 within 0.5 s")
    assert notes.failed_shapes == [("1P1D", split.failure)]
    assert colocated.best_rate_rps > 0
    assert [run.rate_rps for run in colocated.draws] == [colocated.best_rate_rps]
    assert split.draws == []
    assert (found.verdict.outcome, found.verdict.pairs) == ("unknown", [])
    assert found.verdict.text[0] == "Nothing can be said of splitting: no split shape could be measured to the end."
    assert found.verdict.text[-1] == f"1P1D failed and is left out of the comparison: {split.failure}."


async def test_if_every_service_breaks_so_does_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contender, "READY_S", 0.5)
    scripted = Scripted(0.02, 0.02)
    with pytest.raises(Unavailable, match=r"nothing took the place of w-0 and w-1 within 0\.5 s"):
        await compared(scripted, question(), at_load=lambda shape: scripted.routers[shape].status.ClearField("workers"))
