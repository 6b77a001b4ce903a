"""Whether a load that runs can still reach its target."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

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


class Judge:
    """Judges one load while it runs. A request is looked at until it is settled, and not at every look for ever."""

    def __init__(self, arrivals: Sequence[Arrival], objectives: Goodput, target: float) -> None:
        self._arrivals = arrivals
        self._objectives = objectives
        self._spare = len(arrivals) - math.ceil(target * len(arrivals) - _ROUNDING)
        # Requests of which nothing is certain yet, with the tokens that they will have; so many were taken up.
        self._open: list[tuple[Outcome, int]] = []
        self._taken = 0
        # Those that have missed for certain.
        self._lost = 0

    def hopeless(self, outcomes: Sequence[Outcome], now_s: float) -> bool:
        """Whether more requests have missed than may, so that nothing that comes can make up for it.

        outcomes: those of the look before, and what has become due since.
        """
        arrivals = self._arrivals[self._taken : len(outcomes)]
        due = zip(outcomes[self._taken :], (arrival.request.output_tokens for arrival in arrivals), strict=True)
        self._taken = len(outcomes)
        still_open = []
        for outcome, tokens in (*self._open, *due):
            lost = bool(self.missed_by(outcome, tokens, now_s))
            self._lost += lost
            if not lost and not outcome.ended:
                still_open.append((outcome, tokens))
        self._open = still_open
        return self._lost > self._spare

    def causes(self, outcomes: Sequence[Outcome], now_s: float) -> dict[str, int]:
        """How many requests missed each objective, by now and for certain; one may have missed several."""
        each = zip(outcomes, self._arrivals, strict=False)
        missed_by = (self.missed_by(outcome, arrival.request.output_tokens, now_s) for outcome, arrival in each)
        return dict(Counter(name for names in missed_by for name in names))

    def missed_by(self, outcome: Outcome, tokens: int, now_s: float) -> list[Metric] | list[str]:
        if outcome.failure not in (None, "interrupted"):
            return [FAILED]
        # One that was interrupted counts for what it had missed until then.
        return missed(outcome, outcome.scheduled_s, self._objectives, tokens, now_s)
