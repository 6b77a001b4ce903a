"""What an answer may take at most, as `--goodput` says it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from loadtest.metrics import OBJECTIVES, Goodput, Metric
from tandem.errors import ConfigError
from tandem.types import shown


@dataclass(frozen=True)
class Objectives:
    """By metric: milliseconds, or how many times what an answer takes when nothing else runs."""

    limits_ms: Goodput = field(default_factory=dict)
    times_alone: Mapping[Metric, float] = field(default_factory=dict)

    @property
    def metrics(self) -> frozenset[Metric]:
        return frozenset((*self.limits_ms, *self.times_alone))

    def in_ms(self, alone_ms: Goodput) -> Goodput:
        """alone_ms: what an answer takes alone, where that is known. Raises ConfigError where it would have to be."""
        times = self.times_alone.items()
        multiples = {metric: _times(metric, value, alone_ms.get(metric, 0)) for metric, value in times}
        both = {**self.limits_ms, **multiples}
        return {metric: both[metric] for metric in OBJECTIVES if metric in both}


def _times(metric: Metric, times: float, alone_ms: float) -> float:
    """To four digits."""
    limit_ms = float(f"{times * alone_ms:.4g}")
    if not 0 < limit_ms < math.inf:
        raise ConfigError(
            f"--goodput {metric}:{times:g}x is no limit where one answer alone has {metric.upper()} {alone_ms:g} ms: "
            f"say milliseconds, such as {metric}:50",
            field="goodput",
        )
    return limit_ms


def parse_goodput(words: Iterable[str]) -> Objectives:
    """From `ttft:500 tpot:1.5x`, in one text or several. Raises ConfigError."""
    limits_ms: dict[Metric, float] = {}
    times_alone: dict[Metric, float] = {}
    for word in " ".join(words).split():
        name, _, text = word.partition(":")
        metric = next((each for each in OBJECTIVES if each == name), None)
        value = _number(text.removesuffix("x"))
        if metric is None or not 0 < value < math.inf:
            raise ConfigError(
                "--goodput takes ttft, tpot and e2el with milliseconds, such as ttft:500, or with times what an answer "
                f"takes alone, such as ttft:4x, not {shown(word)}",
                field="goodput",
            )
        if metric in limits_ms or metric in times_alone:
            raise ConfigError(f"--goodput names {metric} twice", field="goodput")
        (times_alone if text.endswith("x") else limits_ms)[metric] = value
    return Objectives(limits_ms, times_alone)


def _number(text: str) -> float:
    """NaN for anything else, also for what only Python takes for a number."""
    try:
        return float(text) if re.fullmatch("[0-9.eE+-]+", text) else math.nan
    except ValueError:
        return math.nan
