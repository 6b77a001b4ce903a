"""How much each shape serves within its objectives: draw by draw, over the rate of the search, and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loadtest.compare.html.figure import Drawn, Figure, Look, plain, rate_axis, requests_per_s, rounded
from loadtest.compare.model import Comparison, Measured, Run
from loadtest.compare.table import good_in

METRICS = ("ttft", "tpot", "itl")
_PERCENTILES = ("median", "p90", "p99")


@dataclass(frozen=True)
class Row:
    look: Look
    best_rate: str
    # Shares of requests that met every objective, of all draws, and at the best rate in the search.
    good: str
    attainment: str
    # TTFT, TPOT and ITL in turn, each at the median, 90 % and 99 %.
    latencies: list[str]
    # Where the figures of this row come from, if not from the best rate.
    note: str = ""


def table(shapes: Sequence[Drawn], target: float) -> list[Row]:
    return [_row(each, target) for each in shapes]


def _row(drawn: Drawn, target: float) -> Row:
    measured = drawn.measured
    if measured.failure:
        return Row(drawn.look, "failed", "–", "–", ["–"] * 9, f"failed and takes no part: {measured.failure}.")
    run = at_best(measured)
    if run is None:
        return Row(drawn.look, "–", "–", "–", ["–"] * 9, "nothing was measured")
    note = ""
    if measured.missed_rate_rps == 0:
        note = (
            "missed the objectives even without load. Attainment and latencies are those of requests sent one by one."
        )
    elif not measured.best_rate_rps:
        lowest = f"the lowest rate tried, {requests_per_s(run.rate_rps)}"
        note = f"no rate that was tried kept {target:.0%}. Attainment and latencies are those at {lowest}."
    return Row(
        drawn.look,
        f"{measured.best_rate_rps:.2f}" if measured.best_rate_rps else "none",
        good_in(measured.draws).replace("-", "–"),
        f"{run.attainment:.1%}",
        [_latency(run, name, percentile) for name in METRICS for percentile in _PERCENTILES],
        note,
    )


def at_best(measured: Measured) -> Run | None:
    """The probe that decided; for a shape that kept the target nowhere, its slowest one."""
    return min(measured.probes, key=lambda run: abs(run.rate_rps - measured.best_rate_rps), default=None)


def _latency(run: Run, name: str, percentile: str) -> str:
    """From the schedule where the figure depends on it, as the objectives count."""
    key = f"{percentile}_{name}_ms"
    value = run.figures.get("from_schedule", {}).get(key, run.figures.get(key))
    return "–" if value is None else milliseconds(value)


def milliseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def draws(shapes: Sequence[Drawn], target: float) -> Figure:
    """What became of each draw of arrivals, which both finalists got."""
    data = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": plain(each.look.name),
            "x": list(range(1, len(each.measured.draws) + 1)),
            "y": rounded(run.attainment for run in each.measured.draws),
            "line": each.look.line | {"width": 1},
            "marker": {"symbol": each.look.symbol, "color": f"var({each.look.colour})", "size": 11},
            "customdata": [_told(run) for run in each.measured.draws],
            "hovertemplate": "<b>%{fullData.name}</b><br>draw %{x}: %{y:.1%}<br>%{customdata}<extra></extra>",
        }
        for each in shapes
        if each.measured.draws
    ]
    most = max((len(each.measured.draws) for each in shapes), default=0)
    layout = {
        "xaxis": {"title": {"text": "draw of arrivals"}, "range": [0.5, most + 0.5], "dtick": 1},
        "yaxis": {"title": {"text": "met every objective"}, "range": [0, 1.06], "tickformat": ".0%"},
        "margin": {"l": 56, "r": 12, "t": 12, "b": 44},
        "shapes": [limit_line("y", target)],
    }
    return Figure("draws", "Attainment of both finalists, draw by draw", 280, data, layout)


def attainment(shapes: Sequence[Drawn], comparison: Comparison) -> Figure:
    data: list[dict[str, Any]] = []
    for each in shapes:
        probes = sorted(each.measured.probes, key=lambda run: run.rate_rps)
        # All runs, and once more those that can be compared: what a stopped one would have attained, nobody knows.
        whole = [run for run in probes if not stopped_early(run)]
        data += [
            _line(each, whole) | {"mode": "lines", "line": each.look.line | {"width": 3}, "hoverinfo": "skip"},
            _line(each, probes) | {"mode": "lines+markers", **_marks(each, probes)},
        ]
    rates = [run.rate_rps for each in shapes for run in each.measured.probes]
    target = comparison.target_attainment
    layout = {
        "xaxis": rate_axis(rates),
        "yaxis": {"title": {"text": "met every objective"}, "range": [0, 1.06], "tickformat": ".0%"},
        "margin": {"l": 56, "r": 12, "t": 12, "b": 44},
        "shapes": [limit_line("y", target)],
        "annotations": [
            {
                "text": f"target {target:.0%}",
                "x": 1,
                "xref": "paper",
                "xanchor": "right",
                "y": target,
                "yanchor": "top",
                "showarrow": False,
                "font": {"color": "var(--limit)"},
            }
        ],
    }
    return Figure("attainment", "Attainment over the offered rate, for each shape", 360, data, layout)


def _line(drawn: Drawn, probes: Sequence[Run]) -> dict[str, Any]:
    return {
        "type": "scatter",
        "name": plain(drawn.look.name),
        "x": rounded(run.rate_rps for run in probes),
        "y": rounded(run.attainment for run in probes),
    }


def _marks(drawn: Drawn, probes: Sequence[Run]) -> dict[str, Any]:
    best_rps = drawn.measured.best_rate_rps
    return {
        "line": drawn.look.line | {"width": 1},
        "marker": {
            "symbol": [drawn.look.symbol + ("-open" if stopped_early(run) else "") for run in probes],
            "color": f"var({drawn.look.colour})",
            "opacity": 1,
            "line": {"width": [1.5 if stopped_early(run) else 0 for run in probes]},
            "size": [13 if best_rps and run.rate_rps == best_rps else 7 for run in probes],
        },
        "customdata": [_told(run) for run in probes],
        "hovertemplate": "<b>%{fullData.name}</b><br>%{x:.3g} requests/s: %{y:.1%}<br>%{customdata}<extra></extra>",
    }


def _told(run: Run) -> str:
    if stopped_early(run):
        return f"stopped after {run.offered} requests: the target was out of reach"
    return f"{run.goodput_rps:.2f} good requests/s; {run.offered} offered, {run.failed} failed"


def stopped_early(run: Run) -> bool:
    """Its attainment is that of the requests that were offered until then."""
    return bool(run.figures.get("interrupted"))


def limit_line(axis: str, at: float) -> dict[str, Any]:
    """Across the plot, where an objective or the target lies on the axis."""
    other = "x" if axis == "y" else "y"
    return {
        "type": "line",
        f"{axis}0": at,
        f"{axis}1": at,
        f"{other}0": 0,
        f"{other}1": 1,
        f"{other}ref": "paper",
        "line": {"color": "var(--limit)", "width": 1.5, "dash": "dash"},
    }
