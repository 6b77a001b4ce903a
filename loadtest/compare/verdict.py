"""What a comparison means, in plain words. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from loadtest.compare.judge import FAILED, QUIET, is_disturbed, keeps
from loadtest.compare.model import Measured, Pool, Run, Verdict, WorkerUse

_NAMES = {"ttft": "TTFT", "tpot": "TPOT", "e2el": "E2EL", FAILED: "an answer at all"}


def verdict_on(measured: Sequence[Measured], target: float, interrupted: bool) -> Verdict:
    texts = _Texts(measured, target, interrupted)
    colocated, split = texts.colocated, texts.split
    return Verdict(
        pays=texts.pays,
        best_split=split.shape.name,
        best_colocated=colocated.shape.name,
        ratio=split.goodput_rps / colocated.goodput_rps if colocated.goodput_rps and not texts.failed else None,
        text=list(texts.all()),
    )


def best_of(measured: Sequence[Measured], split: bool) -> Measured:
    """The first of its kind if none kept any rate; one that failed only if all did."""
    return max(_kind(measured, split), key=lambda each: (not each.failure, each.best_rate_rps, each.goodput_rps))


def _kind(measured: Sequence[Measured], split: bool) -> list[Measured]:
    return [each for each in measured if each.shape.is_split == split]


def _beats(winner: Measured, others: Sequence[Measured]) -> bool:
    """It delivers more, at a rate that the search knows each of the others not to keep. Who failed is no rival."""
    rivals = [each for each in others if each.failure is None]
    return bool(rivals and winner.failure is None) and all(
        each.missed_rate_rps is not None
        and winner.best_rate_rps >= each.missed_rate_rps
        and winner.goodput_rps > each.goodput_rps
        for each in rivals
    )


def _fell_short(measured: Measured, target: float) -> Run | None:
    """The slowest load that the shape did not keep."""
    missed = [run for run in measured.probes if not keeps(run.attainment, target)]
    return min(missed, key=lambda run: run.rate_rps, default=None)


class _Texts:
    """The sentences: who won, by how much; who failed; what limited each; other shapes; how sure that is."""

    def __init__(self, measured: Sequence[Measured], target: float, interrupted: bool) -> None:
        self._measured, self._target, self._interrupted = measured, target, interrupted
        self.colocated, self.split = best_of(measured, split=False), best_of(measured, split=True)
        # All shapes of a kind have.
        self.failed = bool(self.colocated.failure or self.split.failure)
        self.pays = _beats(self.split, _kind(measured, split=False))

    def all(self) -> Iterator[str]:
        if self._interrupted:
            yield "The comparison was cut off: what follows is what was found until then."
        yield self._result()
        yield from self._lost()
        if self.failed:
            return
        for best in (self.split, self.colocated):
            yield from self._limit(best)
        yield from self._shown()
        yield from self._others()
        yield from self._certainty()

    def _result(self) -> str:
        """A cut search may know of nobody who lost: then it cannot tell who won."""
        split, colocated = self.split, self.colocated
        if self.failed:
            kind = "split" if split.failure else "colocated"
            return f"Nothing can be said of splitting: no {kind} shape could be measured to the end."
        if not split.best_rate_rps and not colocated.best_rate_rps:
            return "Nothing can be said of splitting: no shape kept the objectives at any rate that was tried."
        both = split.best_rate_rps > 0 and colocated.best_rate_rps > 0
        ratio = split.goodput_rps / colocated.goodput_rps if both else math.nan
        if self.pays:
            head = "Splitting pays here" + (f", {ratio:.2f} times" if both else "")
        elif _beats(colocated, _kind(self._measured, split=True)):
            costs = f", it costs {1 - ratio:.0%} of the goodput ({ratio:.2f} times)"
            head = "Splitting does not pay here" + (costs if both else "")
        elif self._interrupted:
            so_far = f" ({ratio:.2f} times so far)" if both else ""
            head = f"Whether splitting pays cannot be told from what was found until then{so_far}"
        else:
            head = f"Splitting makes no difference that this search can tell ({ratio:.2f} times)"
        return f"{head}: {self._told()}."

    def _told(self) -> str:
        split, colocated = _delivered(self.split), _delivered(self.colocated)
        return (
            f"{split or 'no split shape kept the objectives at any rate that was tried'}, "
            f"{colocated or 'colocated workers kept the objectives at no rate that was tried'}"
        )

    def _lost(self) -> Iterator[str]:
        for each in self._measured:
            for run in [*each.broken, *(run for run in [*each.probes, *each.shown] if run.lost)]:
                yield f"{each.shape.name} lost {_lost_in(run)}."
            if each.failure:
                yield f"{each.shape.name} failed and is left out of the comparison: {each.failure}."

    def _limit(self, measured: Measured) -> Iterator[str]:
        short = _fell_short(measured, self._target)
        if short is not None:
            where = f"at {_rate(short.rate_rps)}, the lowest rate at which it fell short"
            if measured.missed_rate_rps == 0:
                where = "even without load, one request after the other"
            yield f"What limits {measured.shape.name}: {where}, {_causes(short)}."
        if measured.best is not None and measured.best.use:
            yield f"At its best rate {_busy(measured.best.use)}."

    def _shown(self) -> Iterator[str]:
        """What each does at the other one's best rate, of which both have a run."""
        for run in self.split.shown:
            other = next((each for each in self.colocated.shown if each.rate_rps == run.rate_rps), None)
            if other is not None:
                yield (
                    f"With other arrivals, at {_rate(run.rate_rps)}: {self.split.shape.name} met the objectives for "
                    f"{run.attainment:.0%} of the requests, {self.colocated.shape.name} for {other.attainment:.0%}."
                )
        for best in (self.split, self.colocated):
            again = next((run for run in best.shown if run.rate_rps == best.best_rate_rps), None)
            if again is not None and not keeps(again.attainment, self._target):
                yield (
                    f"{best.shape.name} did not keep its own best rate with other arrivals: what it keeps whatever the "
                    "arrivals is less than the search found."
                )

    def _others(self) -> Iterator[str]:
        for split, best in ((False, self.colocated), (True, self.split)):
            others = [each for each in self._measured if each.shape.is_split == split and each is not best]
            if others and best.best_rate_rps:
                words = "; ".join(f"{each.shape.name}: {_reached(each, self._target)}" for each in others)
                kind = "split" if split else "colocated"
                yield f"Of the {kind} shapes {best.shape.name} was the best. The others: {words}."

    def _certainty(self) -> Iterator[str]:
        every = [run for each in self._measured for run in [*each.probes, *each.shown]]
        disturbed = [run.figures["others_busy"] for run in every if is_disturbed(run)]
        if disturbed:
            yield (
                f"The machine was not quiet: in {len(disturbed)} of {len(every)} loads other programs took more than "
                f"{QUIET:.0%} of the cores, up to {max(disturbed):.0%}, also when a load was repeated for that."
            )
        brackets = [
            f"{each.shape.name} within {_rate(each.best_rate_rps)} and {short.rate_rps:.2f}"
            for each in (self.split, self.colocated)
            if each.best_rate_rps and (short := _fell_short(each, self._target)) is not None
        ]
        runs = [each.best for each in self._measured if each.best is not None]
        if brackets and runs:
            offered = min(run.offered for run in runs)
            spread = math.sqrt(self._target * (1 - self._target) / offered)
            yield (
                f"How sure this is: the highest rates lie {', '.join(brackets)}. Each rate was tried once, the best "
                f"ones with {offered} requests or more: a share of {self._target:.0%} of so few is uncertain by "
                f"{spread * 100:.0f} percentage points if requests miss independently of each other, and by more as "
                "they miss in bursts. A difference of less than the resolution is none."
            )


def _delivered(measured: Measured) -> str | None:
    if not measured.best_rate_rps:
        return None
    return f"{measured.shape.name} gives {measured.goodput_rps:.2f} good answers/s at {_rate(measured.best_rate_rps)}"


def _lost_in(run: Run) -> str:
    failures: dict[str, int] = run.figures.get("failures", {})
    failed = sum(count for kind, count in failures.items() if kind != "interrupted")
    where = f"a load at {_rate(run.rate_rps)}"
    return f"{' and '.join(run.lost)} during {where}: of {run.offered} requests offered until then {failed} failed"


def _reached(measured: Measured, target: float) -> str:
    if measured.failure:
        return "failed"
    short = _fell_short(measured, target)
    if measured.best_rate_rps:
        return f"kept {_rate(measured.best_rate_rps)}" + (f", not {short.rate_rps:.2f}" if short else "")
    if measured.missed_rate_rps == 0:
        return "missed the objectives even without load"
    return f"did not keep {_rate(short.rate_rps)}" if short else "not measured"


def _causes(run: Run) -> str:
    causes: dict[str, int] = run.figures["missed"]
    words = [f"{count} missed {_NAMES[name]}" for name, count in sorted(causes.items(), key=lambda item: -item[1])]
    return f"of {run.offered} requests offered until then {' and '.join(words) or 'none missed an objective'}"


def _busy(use: Sequence[WorkerUse]) -> str:
    shares: dict[Pool, list[float]] = {}
    for each in use:
        shares.setdefault(each.pool, []).append(each.busy)
    words = [f"the {pool} pool was {sum(busy) / len(busy):.0%} busy" for pool, busy in shares.items()]
    return " and ".join(words)


def _rate(rate_rps: float) -> str:
    return f"{rate_rps:.2f} requests/s"
