"""When requests arrive, in seconds from the start. Pure: a seed in, times out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Times = NDArray[np.float64]


@dataclass(frozen=True)
class RampUp:
    """The rate grows from the first request to the last one, by equal steps or by equal factors."""

    strategy: Literal["linear", "exponential"]
    start_rps: float
    end_rps: float


def drawn(count: int, rate_rps: float, burstiness: float, seed: int, ramp_up: RampUp | None = None) -> Times:
    """`count` arrivals whose gaps are gamma distributed with shape `burstiness`: 1 is Poisson, less comes in bursts.

    These are the arrivals of `vllm bench serve`, draw for draw: its generator (numpy's first, whose stream is frozen),
    and without a ramp-up its stretching of the whole to count / rate seconds, so that seeds do not differ in rate.
    """
    gaps = 1.0 / _rates(count, rate_rps, ramp_up)  # 0 at an infinite rate
    if gaps.any() and not math.isinf(burstiness):
        gaps = np.random.RandomState(seed).gamma(burstiness, gaps / burstiness)
    times = np.cumsum(gaps)
    if ramp_up is None and count and times[-1] > 0:
        times *= count / rate_rps / times[-1]
    return times


def _rates(count: int, rate_rps: float, ramp_up: RampUp | None) -> Times:
    if ramp_up is None:
        return np.full(count, rate_rps)
    progress = np.arange(count) / max(count - 1, 1)
    if ramp_up.strategy == "linear":
        return ramp_up.start_rps + (ramp_up.end_rps - ramp_up.start_rps) * progress
    return np.asarray(ramp_up.start_rps * (ramp_up.end_rps / ramp_up.start_rps) ** progress)


def replayed(recorded_s: Sequence[float], scale_time: float, jitter_s: float, seed: int) -> Times:
    """A trace's arrivals, from 0 on, each up to `jitter_s` later, all times `scale_time`; not in order any more.

    The jitter is in the trace's own time: it undoes the rounding of its clock and keeps its shape at every scale.
    """
    times = np.asarray(recorded_s, dtype=np.float64)
    times = times + np.random.default_rng(seed).uniform(0, jitter_s, len(times))
    return (times - times.min(initial=math.inf)) * scale_time if len(times) else times
