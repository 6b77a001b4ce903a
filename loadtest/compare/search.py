"""The highest rate that a shape keeps. Pure: what a load at one rate showed in, the next rate to try out."""

from __future__ import annotations

import math
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

    def done(self, floor_rps: float = 0.0) -> bool:
        """floor_rps: what a rival has kept; to be better, this one must keep more."""
        low_rps = max(self.kept_rps, floor_rps)
        if low_rps == 0:
            return self.missed_rps * _FURTHEST <= self.start_rps
        if math.isinf(self.missed_rps):
            return low_rps >= self.start_rps * _FURTHEST
        return self.missed_rps <= low_rps * (1 + self.resolution)

    def next_rps(self, floor_rps: float = 0.0) -> float:
        low_rps = max(self.kept_rps, floor_rps)
        if low_rps == 0:
            return self.start_rps if math.isinf(self.missed_rps) else self.missed_rps / 2
        return low_rps * 2 if math.isinf(self.missed_rps) else math.sqrt(low_rps * self.missed_rps)

    def learn(self, rate_rps: float, kept: bool) -> None:
        if kept:
            self.kept_rps = max(self.kept_rps, rate_rps)
        else:
            self.missed_rps = min(self.missed_rps, rate_rps)

    def give_up(self) -> None:
        """No rate is low enough."""
        self.missed_rps = 0.0
