"""How busy each pool was: a plot for each shape over the rate, and every worker at the rates that are shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, get_args

from loadtest.compare.html.distributions import at_rate, shown_rates
from loadtest.compare.html.figure import Drawn, Figure, Look, plain, rate_axis, rounded
from loadtest.compare.model import Pool, Run

_DASHES: dict[Pool, str] = {"prefill": "dash", "decode": "solid", "colocated": "solid"}
_SYMBOLS: dict[Pool, str] = {"prefill": "triangle-up", "decode": "circle", "colocated": "square"}


def utilisation(shapes: Sequence[Drawn]) -> list[Figure]:
    rates = [run.rate_rps for each in shapes for run in _runs(each)]
    return [_figure(each, rates) for each in shapes if _runs(each)]


def _runs(drawn: Drawn) -> list[Run]:
    """Those whose workers were watched."""
    runs = [run for run in [*drawn.measured.probes, *drawn.measured.draws] if run.use]
    return sorted(runs, key=lambda run: run.rate_rps)


def _figure(drawn: Drawn, rates: Sequence[float]) -> Figure:
    runs = _runs(drawn)
    pools = [pool for pool in get_args(Pool) if any(use.pool == pool for run in runs for use in run.use)]
    data = [trace for pool in pools for trace in _pool(drawn, pool, runs)]
    busiest = max([1.0, *(use.busy for run in runs for use in run.use)])
    layout = {
        "xaxis": rate_axis(rates),
        "yaxis": {"range": [0, 1.05 * busiest], "tickformat": ".0%", "title": {"text": "busy"}},
        "margin": {"l": 54, "r": 10, "t": 8, "b": 42},
    }
    label = f"Busy share of the workers of {drawn.look.name}, over the offered rate"
    return Figure(f"use-{drawn.key}", label, 260, data, layout, drawn.look.name)


def _pool(drawn: Drawn, pool: Pool, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The mean of the pool as a line, and a mark for each worker."""
    colour = f"var({drawn.look.colour})"
    marks = [(run.rate_rps, use) for run in runs for use in run.use if use.pool == pool]
    rates = sorted({rate for rate, _ in marks})
    means = [(rate, fmean(use.busy for at, use in marks if at == rate)) for rate in rates]
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "name": pool,
            "x": rounded(rate for rate, _ in means),
            "y": rounded(mean for _, mean in means),
            "line": {"color": colour, "dash": _DASHES[pool], "width": 2},
            "hoverinfo": "skip",
        },
        {
            "type": "scatter",
            "mode": "markers",
            "name": pool,
            "x": rounded(rate for rate, _ in marks),
            "y": rounded(use.busy for _, use in marks),
            "marker": {"symbol": _SYMBOLS[pool], "color": colour, "size": 7, "opacity": 0.75},
            "customdata": [plain(use.worker) for _, use in marks],
            "hovertemplate": "%{customdata}: %{y:.0%} busy at %{x:.3g} requests/s<extra></extra>",
        },
    ]


@dataclass(frozen=True)
class WorkerRow:
    look: Look
    worker: str
    pool: str
    cores: str
    # One for each rate that is shown; None where it was not measured.
    busy: list[float | None]


def workers(shapes: Sequence[Drawn]) -> list[WorkerRow]:
    return [row for each in shapes for row in _workers_of(each, shown_rates(shapes))]


def _workers_of(drawn: Drawn, rates: Sequence[float]) -> list[WorkerRow]:
    runs = [at_rate(drawn, rate) for rate in rates]
    known = {use.worker: use for run in runs if run for use in run.use}
    return [
        WorkerRow(
            drawn.look,
            name,
            use.pool,
            ", ".join(map(str, use.cores)) or "not pinned",
            [next((each.busy for each in run.use if each.worker == name), None) if run else None for run in runs],
        )
        for name, use in known.items()
    ]
