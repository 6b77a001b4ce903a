"""What a comparison is asked, checked at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from loadtest.objectives import Objectives
from loadtest.schedule.plan import MAX_REQUESTS, Plan, check_timeout, is_positive, require
from tandem.errors import ConfigError
from tandem.types import shown

MAX_WORKERS, MAX_DRAWS = 16, 100
MAX_STEP_TOKENS = 1 << 20


@dataclass(frozen=True)
class Question:
    """Raises ConfigError, naming the option, for what makes no sense."""

    # Without a rate of its own: that is searched.
    plan: Plan
    objectives: Objectives
    # Into how many the machine's cores are shared.
    workers: int
    # Step budgets of colocated workers, each a shape of its own; split workers get the largest.
    step_tokens: Sequence[int]
    # The share of offered requests that must meet every objective.
    target: float = 0.9
    # A load is made longer than its number of prompts if it would be over sooner.
    min_seconds: float = 30.0
    # The search ends when the lowest rate that failed is at most this share above the highest that did not.
    resolution: float = 0.1
    # Draws of arrivals that decide between the best of either kind.
    draws: int = 5
    # The first rate to try, requests a second; None: what the workers could prefill one by one.
    start_rps: float | None = None
    # Bound of the whole comparison, seconds.
    time_limit_s: float | None = None
    # Bound of one answer.
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        require(2 <= self.workers <= MAX_WORKERS, "workers", f"in [2, {MAX_WORKERS}]", self.workers)
        require(0 < self.target < 1, "attainment", "between 0 and 1", self.target)
        require(0 <= self.min_seconds < math.inf, "min_seconds", "a number of seconds", self.min_seconds)
        require(0.01 <= self.resolution <= 1, "resolution", "in [0.01, 1]", self.resolution)
        require(1 <= self.draws <= MAX_DRAWS, "draws", f"in [1, {MAX_DRAWS}]", self.draws)
        for option, value in (("start_rate", self.start_rps), ("time_limit", self.time_limit_s)):
            require(value is None or is_positive(value), option, "a number above 0", value)
        check_timeout(self.timeout_s)
        # With TPOT alone requests may wait for their first token for ever, and no rate would be too high.
        if not {"ttft", "e2el"} & self.objectives.metrics:
            raise ConfigError(
                "--goodput must limit ttft or e2el, such as ttft:2000 tpot:100: without them any queue would do",
                field="goodput",
            )
        fewest = math.ceil(1 / (1 - self.target) - 1e-9)
        if self.plan.num_prompts < fewest:
            raise ConfigError(
                f"--num-prompts must be {fewest} or more: of fewer, one late answer is more than "
                f"--attainment {self.target:g} allows",
                field="num_prompts",
            )

    def plan_at(self, rate_rps: float, draw: int = 0) -> Plan:
        """The same requests at every rate, only nearer together; a longer load goes on where a shorter one ends.

        draw: number of the draw; the search has 0.
        """
        count = max(self.plan.num_prompts, math.ceil(rate_rps * self.min_seconds))
        return replace(
            self.plan,
            request_rate=rate_rps,
            num_prompts=min(count, MAX_REQUESTS),
            seed=(self.plan.seed + draw) % 2**32,
        )


def parse_step_tokens(text: str) -> tuple[int, ...]:
    """From `32,128,512`. Raises ConfigError."""
    try:
        values = tuple(int(each) for each in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(1 <= value <= MAX_STEP_TOKENS for value in values) or len(set(values)) < len(values):
        raise ConfigError(
            f"--step-tokens takes different numbers in [1, {MAX_STEP_TOKENS}] with commas between, not {shown(text)}",
            field="step_tokens",
        )
    return values
