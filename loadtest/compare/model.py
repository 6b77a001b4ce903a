"""What a comparison found: the JSON file, and all that the report shows."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Pool = Literal["prefill", "decode", "colocated"]


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ServiceShape(_Value):
    """How the K workers of a service are divided: all colocated, or x prefill and y decode with x + y = K."""

    prefill: int = 0
    decode: int = 0
    colocated: int = 0
    # Tokens that one engine step computes at most: what chunked prefill cuts a prompt into.
    step_tokens: int

    @property
    def is_split(self) -> bool:
        return not self.colocated

    @property
    def division(self) -> tuple[int, int, int]:
        """Without the settings."""
        return self.prefill, self.decode, self.colocated

    @property
    def name(self) -> str:
        """`2 colocated, 64-token steps` or `1P1D`."""
        if self.is_split:
            return f"{self.prefill}P{self.decode}D"
        return f"{self.colocated} colocated, {self.step_tokens}-token steps"


class ShownAnswer(_Value):
    """One request of a run. Times are seconds from the run's start, on the client's clock."""

    prompt_tokens: int
    output_tokens: int
    scheduled_s: float
    sent_s: float
    # When tokens came; several may come at once.
    arrivals_s: list[float]
    # Milliseconds on the router's clock, from accepting the request on: the marks of `tandem.timeline`.
    phases_ms: dict[str, float]
    prefill_worker: str
    # The same as prefill_worker when colocated.
    decode_worker: str
    # Every objective, counted from the moment when the request was due.
    met: bool
    failure: str | None = None


class WorkerUse(_Value):
    """One worker during one run."""

    worker: str
    pool: Pool
    cores: list[int]
    # CPU seconds of its process / (seconds of the run × cores): 1 is fully busy.
    busy: float


class Run(_Value):
    """One load at one rate against one shape."""

    rate_rps: float
    duration_s: float
    offered: int
    failed: int
    # Requests that met every objective, counted from their schedule: as a share of those offered, and each second.
    attainment: float
    goodput_rps: float
    # All figures of `tandem bench run`.
    figures: dict[str, Any]
    use: list[WorkerUse]
    # Workers that died during it, or that the router lost; what failed for that counts as failed.
    lost: list[str] = []


class ShownRun(Run):
    """A run whose answers are kept: for the distributions and the timeline."""

    answers: list[ShownAnswer]


class Measured(_Value):
    """All that was run against one shape."""

    shape: ServiceShape
    # Loads of the search, in the order in which they ran.
    probes: list[Run]
    # The highest rate that kept the share of objectives, with the search's one draw of arrivals; 0 if no rate did.
    # Settings that lose to others of the same workers may have none: they are tried only above what those have kept.
    best_rate_rps: float
    # The lowest rate that it was found not to keep: 0 if it misses the objectives even without load, None if the search
    # found none.
    missed_rate_rps: float | None = None
    # Loads of the finalists, all at one rate: draw by draw the same arrivals for both, by turns.
    draws: list[Run] = []
    # The first of those, with its answers.
    shown: list[ShownRun]
    # Loads that missed the target while a worker was lost; they were offered again, and decide nothing.
    broken: list[Run] = []
    # Why there was no going on with it, such as workers that die again and again; it takes no part in the verdict.
    failure: str | None = None

    @property
    def best(self) -> Run | None:
        """The probe at its best rate."""
        return next((run for run in self.probes if run.rate_rps == self.best_rate_rps), None)


# What splitting does: it pays if the ratio was above 1 in every draw, it costs if it was below in every one; unknown:
# too few draws, or none that says anything.
Outcome = Literal["pays", "costs", "too close", "unknown"]


class Pair(_Value):
    """One draw of arrivals that both finalists got: how many answers met every objective."""

    offered: int
    split_good: int
    colocated_good: int

    @property
    def ratio(self) -> float:
        """Infinite if only the split shape had a good answer; 1 if neither had."""
        if self.colocated_good:
            return self.split_good / self.colocated_good
        return math.inf if self.split_good else 1.0


class Verdict(_Value):
    """Good answers of the best split shape against those of the best colocated one, to the same requests."""

    outcome: Outcome
    best_split: str
    best_colocated: str
    # At which the draws were offered; None without any.
    rate_rps: float | None
    pairs: list[Pair]
    # The least, the median and the largest ratio of the pairs. None: infinite, or there are no pairs.
    lowest: float | None
    median: float | None
    highest: float | None
    # Plain words, also when splitting does not pay; sentences. The first is the result; of an interrupted comparison
    # the first says that it was, and the second is the result.
    text: list[str] = Field(min_length=1)


class Machine(_Value):
    # Model of the processor.
    processor: str
    cores: int
    memory_gib: float
    # Devices that workers ran on: cpu, or the name of the GPU.
    device: str


class Comparison(_Value):
    tandem_version: str
    date: str
    # As it was typed.
    command: str
    machine: Machine
    model: str
    # What was asked for: the keys of `loadtest.schedule.plan.Plan.as_json`.
    workload: dict[str, Any]
    # Milliseconds by metric: ttft, tpot, e2el.
    objectives: dict[str, float]
    # Those that were asked for as so many times what an answer takes alone.
    times_alone: dict[str, float] = {}
    # The share of offered requests that must meet every objective.
    target_attainment: float
    measured: list[Measured]
    verdict: Verdict
    # Ctrl-C, or a time limit: what was found until then.
    interrupted: bool = False
