"""Whether a load that runs can still reach its target. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from loadtest.compare.model import Run
from loadtest.metrics import Goodput, Metric, Outcome, missed
from loadtest.runner import Arrival

FAILED = "failed"
# Share of the cores that other programs may take before a load counts as disturbed.
QUIET = 0.05
# Shares are sums of ones divided by a count: this much is rounding.
_ROUNDING = 1e-9


def keeps(attainment: float, target: float) -> bool:
    return attainment >= target - _ROUNDING


def is_disturbed(run: Run) -> bool:
    return bool(run.figures.get("others_busy", 0.0) > QUIET)


@dataclass(frozen=True)
class Judge:
    arrivals: Sequence[Arrival]
    objectives: Goodput
    target: float

    def hopeless(self, outcomes: Sequence[Outcome], now_s: float) -> bool:
        """Whether more requests have missed than may, so that nothing that comes can make up for it."""
        spare = len(self.arrivals) - math.ceil(self.target * len(self.arrivals) - _ROUNDING)
        return sum(bool(names) for names in self._missed(outcomes, now_s)) > spare

    def causes(self, outcomes: Sequence[Outcome], now_s: float) -> dict[str, int]:
        """How many requests missed each objective, by now and for certain; one may have missed several."""
        return dict(Counter(name for names in self._missed(outcomes, now_s) for name in names))

    def _missed(self, outcomes: Sequence[Outcome], now_s: float) -> list[list[Metric] | list[str]]:
        """Of each request that has become due, in that order."""
        return [
            self._missed_by(outcome, arrival.request.output_tokens, now_s)
            for outcome, arrival in zip(outcomes, self.arrivals, strict=False)
        ]

    def _missed_by(self, outcome: Outcome, tokens: int, now_s: float) -> list[Metric] | list[str]:
        if outcome.failure not in (None, "interrupted"):
            return [FAILED]
        # One that was interrupted counts for what it had missed until then.
        return missed(outcome, outcome.scheduled_s, self.objectives, tokens, now_s)
