"""What a comparison means, in plain words. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

from loadtest.compare.judge import FAILED, QUIET, is_disturbed, keeps
from loadtest.compare.model import Measured, Outcome, Pair, Pool, Run, Verdict, WorkerUse

# Fewer draws of arrivals that all fall on one side of 1 are no verdict: of as many, equal shapes give that in 1 of 16
# comparisons.
LEAST_DRAWS = 5
_NAMES = {"ttft": "TTFT", "tpot": "TPOT", "e2el": "E2EL", FAILED: "an answer at all"}


def verdict_on(measured: Sequence[Measured], target: float, interrupted: bool) -> Verdict:
    texts = _Texts(measured, target, interrupted)
    ratios = texts.ratios
    return Verdict(
        outcome=texts.outcome,
        best_split=texts.split.shape.name,
        best_colocated=texts.colocated.shape.name,
        rate_rps=texts.split.draws[0].rate_rps if texts.pairs else None,
        pairs=texts.pairs,
        lowest=_finite(min(ratios, default=math.inf)),
        median=_finite(statistics.median(ratios) if ratios else math.inf),
        highest=_finite(max(ratios, default=math.inf)),
        text=list(texts.all()),
    )


def best_of(measured: Sequence[Measured], split: bool) -> Measured:
    """The first of its kind if none kept any rate; one that failed only if all did."""
    return max(_kind(measured, split), key=lambda each: (not each.failure, each.best_rate_rps))


def common_rate(best: Sequence[Measured]) -> float:
    """Between what either kind was found to keep, where the draws are compared: the better one has room there, the
    other has not. If nobody kept any rate, the lowest that was tried.
    """
    kept = [each.best_rate_rps for each in best if each.best_rate_rps and not each.failure]
    if kept:
        return float(math.prod(kept) ** (1 / len(kept)))
    return min((run.rate_rps for each in best for run in each.probes), default=1.0)


def _kind(measured: Sequence[Measured], split: bool) -> list[Measured]:
    return [each for each in measured if each.shape.is_split == split]


def _good(run: Run) -> int:
    return round(run.attainment * run.offered)


def _finite(value: float) -> float | None:
    return None if math.isinf(value) else value


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
        # Draw by draw; one that only one of them got is no pair.
        both = [] if self.failed else zip(self.split.draws, self.colocated.draws, strict=False)
        self.pairs = [
            Pair(offered=one.offered, split_good=_good(one), colocated_good=_good(other)) for one, other in both
        ]
        self.ratios = [pair.ratio for pair in self.pairs]
        self.outcome = self._outcome()

    def _outcome(self) -> Outcome:
        kept = self.split.best_rate_rps or self.colocated.best_rate_rps
        if not kept or len(self.pairs) < LEAST_DRAWS:
            return "unknown"
        if min(self.ratios) > 1 and not self._unseen(self.colocated):
            return "pays"
        if max(self.ratios) < 1 and not self._unseen(self.split):
            return "costs"
        return "too close" if min(self.ratios) <= 1 <= max(self.ratios) else "unknown"

    def _unseen(self, loser: Measured) -> list[str]:
        """Shapes of its kind that may be better: the search was cut before they missed the rate of the draws."""
        if not self._interrupted:
            return []
        rate_rps = loser.draws[0].rate_rps
        rivals = [
            each for each in _kind(self._measured, loser.shape.is_split) if each is not loser and not each.failure
        ]
        return [each.shape.name for each in rivals if each.missed_rate_rps is None or each.missed_rate_rps > rate_rps]

    def all(self) -> Iterator[str]:
        if self._interrupted:
            yield "The comparison was cut off: what follows is what was found until then."
        yield self._result()
        yield from self._lost()
        if self.failed:
            return
        for best in (self.split, self.colocated):
            yield from self._limit(best)
        yield from self._others()
        yield from self._certainty()

    def _result(self) -> str:
        if self.failed:
            kind = "split" if self.split.failure else "colocated"
            return f"Nothing can be said of splitting: no {kind} shape could be measured to the end."
        if not self.split.best_rate_rps and not self.colocated.best_rate_rps:
            return "Nothing can be said of splitting: no shape kept the objectives at any rate that was tried."
        if not self.pairs:
            return "Whether splitting pays cannot be told: no draw of arrivals was offered to both kinds."
        times = f"{_times(min(self.ratios))} to {_times(max(self.ratios))} times the good answers"
        if self.outcome == "pays":
            head = f"Splitting pays here, {times}"
        elif self.outcome == "costs":
            head = f"Splitting does not pay here, it gives {times}"
        elif len(self.pairs) < LEAST_DRAWS:
            head = f"Whether splitting pays cannot be told from so few draws, {times}"
        elif self.outcome == "too close":
            head = f"Whether splitting pays cannot be told, it is too close, {times}"
        else:
            head = f"Whether splitting pays cannot be told from what was found until then, {times}"
        return f"{head}: {self._told()}."

    def _told(self) -> str:
        split, colocated = ([_good(run) for run in each.draws] for each in (self.split, self.colocated))
        count = len(self.pairs)
        draws = f"each of {count} draws of arrivals" if count > 1 else "one draw of arrivals"
        return (
            f"of {self.pairs[0].offered} requests in {draws}, offered to both by turns at "
            f"{_rate(self.split.draws[0].rate_rps)}, {self.split.shape.name} met the objectives for "
            f"{_listed(split[:count])}, {self.colocated.shape.name} for {_listed(colocated[:count])}; "
            f"the median ratio is {_times(statistics.median(self.ratios))}"
        )

    def _lost(self) -> Iterator[str]:
        for each in self._measured:
            for run in [*each.broken, *(run for run in [*each.probes, *each.draws] if run.lost)]:
                failures: dict[str, int] = run.figures.get("failures", {})
                failed = sum(count for kind, count in failures.items() if kind != "interrupted")
                yield (
                    f"{each.shape.name} lost {' and '.join(run.lost)} during a load at {_rate(run.rate_rps)}: of "
                    f"{run.offered} requests offered until then {failed} failed."
                )
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

    def _others(self) -> Iterator[str]:
        for split, best in ((False, self.colocated), (True, self.split)):
            others = [each for each in self._measured if each.shape.is_split == split and each is not best]
            if others and best.best_rate_rps:
                words = "; ".join(f"{each.shape.name}: {_reached(each, self._target)}" for each in others)
                kind = "split" if split else "colocated"
                yield f"Of the {kind} shapes {best.shape.name} was the best. The others: {words}."

    def _certainty(self) -> Iterator[str]:
        every = [run for each in self._measured for run in [*each.probes, *each.draws]]
        disturbed = [run.figures["others_busy"] for run in every if is_disturbed(run)]
        if disturbed:
            yield (
                f"The machine was not quiet: in {len(disturbed)} of {len(every)} loads other programs took more than "
                f"{QUIET:.0%} of the cores, up to {max(disturbed):.0%}, also when a load was repeated for that."
            )
        brackets = [
            f"{each.shape.name} kept {_rate(each.best_rate_rps)} and missed {short.rate_rps:.2f}"
            for each in (self.split, self.colocated)
            if each.best_rate_rps and (short := _fell_short(each, self._target)) is not None
        ]
        if brackets:
            yield (
                f"The search tried each rate with one draw of arrivals, so it only says where to compare: "
                f"{', '.join(brackets)}."
            )
        if len(self.pairs) >= LEAST_DRAWS:
            yield (
                f"How sure this is: shapes that are equal have all of {len(self.pairs)} ratios on one side of 1 in one "
                f"of {1 << (len(self.pairs) - 1)} comparisons."
            )


def _times(ratio: float) -> str:
    return "∞" if math.isinf(ratio) else f"{ratio:.2f}"


def _listed(counts: Sequence[int]) -> str:
    *most, last = map(str, counts)
    return f"{', '.join(most)} and {last}" if most else last


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
