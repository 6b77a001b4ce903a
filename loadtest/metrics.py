"""Outcomes in, figures out, under the names and definitions of `vllm bench serve`. Pure.

    TTFT   first arrival - start          E2EL   last arrival - start
    TPOT   (E2EL - TTFT) / (output tokens - 1); answers of one token have none, and count as 0 for goodput
    ITL    every gap between two arrivals of one answer, those of all answers together
    goodput     answers a second that met every objective
    attainment  answers that met every objective / requests that were offered, failed ones included

The start is the moment of sending, as for vLLM. Everything that depends on it is given a second time, under
`from_schedule`, from the moment when the request was due: a client or a server that is late cannot hide it there.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Metric = Literal["ttft", "tpot", "e2el"]
OBJECTIVES: tuple[Metric, ...] = ("ttft", "tpot", "e2el")
# Characters of what a server says of a failure.
MAX_ERROR_CHARS = 300
# Milliseconds that an answer may take at most, by metric.
Goodput = Mapping[Metric, float]


@dataclass
class Outcome:
    """One request that was offered: filled in while it runs. Times are seconds of one clock."""

    scheduled_s: float
    # Until the server has counted: what was sent.
    prompt_tokens: int
    sent_s: float | None = None
    # When tokens came; several may come at once.
    arrivals_s: list[float] = field(default_factory=list)
    # As the server counts; None if it did not say.
    counted_tokens: int | None = None
    # Nothing more comes, an answer or a failure.
    ended: bool = False
    # Why there is no whole answer: a kind to count by, and words.
    failure: str | None = None
    error: str = ""
    # Milliseconds of the phases on the router's clock, and the workers: of answers by gRPC.
    phases_ms: dict[str, float] = field(default_factory=dict)
    workers: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return self.failure is None

    @property
    def output_tokens(self) -> int:
        if not self.ok:
            return 0
        return len(self.arrivals_s) if self.counted_tokens is None else self.counted_tokens

    def set_failure(self, kind: str, error: str) -> None:
        self.failure, self.error = kind, one_line(error)

    @property
    def start_s(self) -> float:
        return self.scheduled_s if self.sent_s is None else self.sent_s

    @property
    def tpot_s(self) -> float | None:
        if self.output_tokens < 2:
            return None
        return (self.arrivals_s[-1] - self.arrivals_s[0]) / (self.output_tokens - 1)

    @property
    def itls_s(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.arrivals_s, self.arrivals_s[1:], strict=False)]


def one_line(text: str) -> str:
    """What a stranger said, for a person's terminal: without line ends and control characters, and not too long."""
    plain = "".join(char if char.isprintable() else " " for char in text[: 2 * MAX_ERROR_CHARS])
    return " ".join(plain.split())[:MAX_ERROR_CHARS]


def summarize(
    outcomes: Sequence[Outcome], duration_s: float, percentiles: Sequence[float], goodput: Goodput
) -> dict[str, Any]:
    """All figures; a latency of which nothing was measured is None (vLLM writes 0, as if it had been reached)."""
    done = [outcome for outcome in outcomes if outcome.ok]
    tokens_in, tokens_out = (sum(getattr(each, name) for each in done) for name in ("prompt_tokens", "output_tokens"))
    return {
        "duration": duration_s,
        "offered": len(outcomes),
        "completed": len(done),
        "failed": len(outcomes) - len(done),
        "failures": dict(Counter(outcome.failure for outcome in outcomes if not outcome.ok)),
        # From the end, so that the first one of each kind stays.
        "first_errors": {each.failure: each.error for each in reversed(outcomes) if each.failure is not None},
        "total_input_tokens": tokens_in,
        "total_output_tokens": tokens_out,
        "request_throughput": len(done) / duration_s,
        "output_throughput": tokens_out / duration_s,
        "total_token_throughput": (tokens_in + tokens_out) / duration_s,
        **_peaks(done),
        **_from(lambda outcome: outcome.start_s, done, len(outcomes), duration_s, percentiles, goodput),
        **_spread("tpot", [each.tpot_s for each in done if each.tpot_s is not None], percentiles),
        **_spread("itl", [gap for each in done for gap in each.itls_s], percentiles),
        **_spread("client_queue_time", [each.start_s - each.scheduled_s for each in done], percentiles),
        "from_schedule": _from(
            lambda outcome: outcome.scheduled_s, done, len(outcomes), duration_s, percentiles, goodput
        ),
    }


def _from(
    start: Callable[[Outcome], float],
    done: Sequence[Outcome],
    offered: int,
    duration_s: float,
    percentiles: Sequence[float],
    goodput: Goodput,
) -> dict[str, Any]:
    """What depends on when a request's clock starts."""
    ttfts = [outcome.arrivals_s[0] - start(outcome) for outcome in done]
    e2els = [outcome.arrivals_s[-1] - start(outcome) for outcome in done]
    good = sum(not missed(outcome, start(outcome), goodput) for outcome in done)
    return {
        "request_goodput": good / duration_s if goodput else None,
        "attainment": good / offered if goodput and offered else None,
        **_spread("ttft", ttfts, percentiles),
        **_spread("e2el", e2els, percentiles),
    }


def missed(
    outcome: Outcome, start_s: float, goodput: Goodput, tokens: int | None = None, now_s: float = math.inf
) -> list[Metric]:
    """The objectives that an answer missed.

    Of one that is under way, with the `tokens` that it will have, those that it has missed by now whatever comes.
    """
    reached = outcome.arrivals_s or [now_s]
    gaps = (outcome.output_tokens if tokens is None else tokens) - 1
    seconds: dict[Metric, float] = {
        "ttft": reached[0] - start_s,
        "tpot": (reached[-1] - reached[0]) / gaps if gaps > 0 else 0.0,
        "e2el": reached[-1] - start_s,
    }
    return [name for name, limit_ms in goodput.items() if seconds[name] * 1000 > limit_ms]


def _spread(name: str, seconds: Sequence[float], percentiles: Sequence[float]) -> dict[str, float | None]:
    keys = ["mean", "median", "std", *(f"p{percentile:g}" for percentile in percentiles)]
    if not seconds:
        return {f"{key}_{name}_ms": None for key in keys}
    values = np.asarray(seconds) * 1000
    found = [values.mean(), np.median(values), values.std(), *np.percentile(values, percentiles)]
    return {f"{key}_{name}_ms": float(value) for key, value in zip(keys, found, strict=True)}


def _peaks(done: Sequence[Outcome]) -> dict[str, float]:
    """The most arrivals, and the most answers under way, within one second counted from the first start."""
    if not done:
        return {"max_output_tokens_per_s": 0.0, "max_concurrent_requests": 0}
    first_s = min(outcome.start_s for outcome in done)
    arrivals = np.concatenate([outcome.arrivals_s for outcome in done]) - first_s
    seconds = int(arrivals.max()) + 1
    active = np.zeros(seconds + 1, dtype=np.int64)
    for outcome in done:  # differences: one more from its first second on, one less after its last
        active[int(outcome.start_s - first_s)] += 1
        active[int(outcome.arrivals_s[-1] - first_s) + 1] -= 1
    return {
        "max_output_tokens_per_s": float(np.bincount(arrivals.astype(np.int64)).max()),
        "max_concurrent_requests": int(active.cumsum().max()),
    }


def details(outcomes: Sequence[Outcome]) -> dict[str, list[Any]]:
    """What is known of each request, in the order of arrival; times in seconds, as vLLM's."""
    return {
        "input_lens": [outcome.prompt_tokens for outcome in outcomes],
        "output_lens": [outcome.output_tokens for outcome in outcomes],
        "ttfts": [outcome.arrivals_s[0] - outcome.start_s if outcome.arrivals_s else 0.0 for outcome in outcomes],
        "itls": [outcome.itls_s for outcome in outcomes],
        "latencies": [outcome.arrivals_s[-1] - outcome.start_s if outcome.arrivals_s else 0.0 for outcome in outcomes],
        "start_times": [outcome.start_s for outcome in outcomes],
        "queue_times": [outcome.start_s - outcome.scheduled_s for outcome in outcomes],
        "errors": [outcome.error for outcome in outcomes],
        "scheduled_times": [outcome.scheduled_s for outcome in outcomes],
        "failure_kinds": [outcome.failure for outcome in outcomes],
        "phases_ms": [outcome.phases_ms for outcome in outcomes],
        "workers": [list(outcome.workers) for outcome in outcomes],
    }
