"""The highest rate that a shape keeps. Pure: what a load at one rate showed in, the next rate to try out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Halvings, or doublings, of the first rate after which there is no bracket to be hoped for.
MAX_STEPS = 10
_FURTHEST = float(1 << MAX_STEPS)


@dataclass
class Search:
    """Brackets the highest rate by halving and doubling, then closes in on it by halves of the ratio.

    unknown ──kept──▶ doubling ──missed─┐
       └────missed──▶ halving ───kept───┴▶ bracketed ──missed/kept within 1 + resolution──▶ done
    """

    start_rps: float
    resolution: float
    # The highest rate that was kept, the lowest one that was not.
    kept_rps: float = 0.0
    missed_rps: float = math.inf

    @property
    def done(self) -> bool:
        if self.kept_rps == 0:
            return self.missed_rps * _FURTHEST <= self.start_rps
        if math.isinf(self.missed_rps):
            return self.kept_rps >= self.start_rps * _FURTHEST
        return self.missed_rps <= self.kept_rps * (1 + self.resolution)

    def next_rps(self) -> float:
        if self.kept_rps == 0:
            return self.start_rps if math.isinf(self.missed_rps) else self.missed_rps / 2
        return self.kept_rps * 2 if math.isinf(self.missed_rps) else math.sqrt(self.kept_rps * self.missed_rps)

    def learn(self, rate_rps: float, kept: bool) -> None:
        if kept:
            self.kept_rps = max(self.kept_rps, rate_rps)
        else:
            self.missed_rps = min(self.missed_rps, rate_rps)

    def give_up(self) -> None:
        """No rate is low enough."""
        self.missed_rps = 0.0


def still_racing(search: Search, rivals: Sequence[Search]) -> bool:
    """Whether to go on: only the best of a family counts, and one that missed what a rival kept is not it."""
    return not search.done and search.missed_rps > max((rival.kept_rps for rival in rivals), default=0.0)
