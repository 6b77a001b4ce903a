"""Which share of requests, or of tokens, was how fast: a curve for each shape, at each rate that they share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from loadtest.compare.html.figure import Drawn, Figure, log_axis, plain, requests_per_s, thinned
from loadtest.compare.html.goodput import limit_line
from loadtest.compare.model import Comparison, ShownAnswer, ShownRun

_POINTS_OF_CURVE, _POINTS_OF_PAGE = 400, 45_000
# What a clock can tell apart; a logarithmic axis has no 0.
_LEAST_MS = 0.1


@dataclass(frozen=True)
class _Metric:
    key: str
    title: str
    share_of: str
    # Values of one answer, whose arrivals are given too.
    seconds: Callable[[ShownAnswer, Sequence[float]], list[float]]
    # The objective whose line it shows.
    objective: str


_METRICS = (
    _Metric(
        "ttft", "TTFT: to the first token", "requests", lambda answer, at_s: [at_s[0] - answer.scheduled_s], "ttft"
    ),
    _Metric(
        "tpot",
        "TPOT: mean per further token",
        "requests",
        lambda answer, at_s: [(at_s[-1] - at_s[0]) / (answer.output_tokens - 1)] if answer.output_tokens > 1 else [],
        "tpot",
    ),
    _Metric(
        "itl",
        "ITL: waits between tokens",
        "waits",
        lambda _, at_s: [later - earlier for earlier, later in pairwise(at_s)],
        "tpot",
    ),
    _Metric(
        "e2el", "E2EL: to the last token", "requests", lambda answer, at_s: [at_s[-1] - answer.scheduled_s], "e2el"
    ),
)


@dataclass(frozen=True)
class AtRate:
    rate_rps: float
    # The names of shapes that ran at other shared rates, but not at this one.
    missing: list[str]
    figures: list[Figure]


def shown_rates(shapes: Sequence[Drawn]) -> list[float]:
    return sorted({run.rate_rps for each in shapes for run in each.measured.shown})


def at_rate(drawn: Drawn, rate_rps: float) -> ShownRun | None:
    return next((run for run in drawn.measured.shown if run.rate_rps == rate_rps), None)


def distributions(shapes: Sequence[Drawn], comparison: Comparison) -> list[AtRate]:
    metrics = [each for each in _METRICS if each.key != "e2el" or "e2el" in comparison.objectives]
    rates = shown_rates(shapes)
    curves = len(metrics) * sum(len(each.measured.shown) for each in shapes)
    points = min(_POINTS_OF_CURVE, _POINTS_OF_PAGE // max(1, curves))
    values = {metric.key: _values(metric, shapes) for metric in metrics}
    return [
        AtRate(
            rate,
            [each.look.name for each in shapes if each.measured.shown and at_rate(each, rate) is None],
            [
                _figure(metric, index, rate, values[metric.key], shapes, comparison.objectives, points)
                for metric in metrics
            ],
        )
        for index, rate in enumerate(rates)
    ]


_Values = dict[tuple[str, float], list[float]]


def _values(metric: _Metric, shapes: Sequence[Drawn]) -> _Values:
    """Milliseconds of whole answers, by shape and rate."""
    return {
        (each.key, run.rate_rps): [
            max(_LEAST_MS, second * 1000)
            for answer in run.answers
            if answer.failure is None and answer.arrivals_s
            for second in metric.seconds(answer, answer.arrivals_s)
        ]
        for each in shapes
        for run in each.measured.shown
    }


def _figure(
    metric: _Metric,
    index: int,
    rate_rps: float,
    values: _Values,
    shapes: Sequence[Drawn],
    objectives: dict[str, float],
    points: int,
) -> Figure:
    curves = [_curve(each, values.get((each.key, rate_rps), []), points) for each in shapes]
    limit_ms = objectives.get(metric.objective)
    # One range for all rates: plots above each other can be compared.
    everything = [value for each in values.values() for value in each] + ([limit_ms] if limit_ms else [])
    # Waits between tokens that come together are next to nothing, and would take half of the axis.
    extent = (float(np.quantile(everything, 0.01)), max(everything)) if everything else (1.0, 1000.0)
    layout = {
        "xaxis": log_axis(*extent, "ms"),
        "yaxis": {"range": [0, 1.02], "tickformat": ".0%", "title": {"text": f"share of {metric.share_of}"}},
        "margin": {"l": 54, "r": 10, "t": 8, "b": 42},
        "shapes": [] if limit_ms is None else [limit_line("x", limit_ms)],
        "annotations": [] if limit_ms is None else [_limit_name(metric, limit_ms, extent)],
    }
    label = f"{metric.title}; at {requests_per_s(rate_rps)}"
    return Figure(f"{metric.key}-{index}", label, 290, [each for each in curves if each["x"]], layout, metric.title)


def _curve(drawn: Drawn, values: Sequence[float], points: int) -> dict[str, Any]:
    milliseconds_in_order, shares = thinned(values, points)
    return {
        "type": "scatter",
        "mode": "lines",
        "name": plain(drawn.look.name),
        "x": milliseconds_in_order,
        "y": shares,
        "line": drawn.look.line,
        "hovertemplate": "%{y:.1%} within %{x:.4~g} ms<extra>%{fullData.name}</extra>",
    }


def _limit_name(metric: _Metric, limit_ms: float, extent: tuple[float, float]) -> dict[str, Any]:
    """On the side of its line where there is more room."""
    is_right = limit_ms**2 > extent[0] * extent[1]
    return {
        "text": f"{metric.objective.upper()} objective {limit_ms:,.6g} ms",
        "x": math.log10(limit_ms),
        "y": 0.02,
        "yref": "paper",
        "textangle": -90,
        "xanchor": "right" if is_right else "left",
        "yanchor": "bottom",
        "showarrow": False,
        "font": {"color": "var(--limit)"},
    }
