"""A comparison for a person at a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from loadtest.compare.model import Comparison, Measured, Run


def table_of(found: Comparison) -> Table:
    table = Table("shape", box=None, padding=(0, 2))
    for head in (
        "rate kept in the search",
        "good in the draws",
        "median TTFT",
        "p90 TTFT",
        "median TPOT",
        "p90 TPOT",
        "pools busy",
    ):
        table.add_column(head, justify="right")
    for each in found.measured:
        table.add_row(each.shape.name, *_cells(each))
    return table


def _cells(measured: Measured) -> list[str]:
    if measured.failure:
        return ["failed"]
    best = measured.best
    if best is None and measured.missed_rate_rps == 0:
        return ["none, even without load"]
    if best is None:
        return [f"below {min(run.rate_rps for run in measured.probes):.2f}/s" if measured.probes else "not measured"]
    figures = {**best.figures, **best.figures["from_schedule"]}
    found = [figures[f"{head}_{name}_ms"] for name in ("ttft", "tpot") for head in ("median", "p90")]
    latencies = ["-" if value is None else f"{value:.0f} ms" for value in found]
    busy = " ".join(f"{use.pool} {use.busy:.0%}" for use in best.use)
    return [f"{best.rate_rps:.2f}/s", good_in(measured.draws), *latencies, busy]


def good_in(draws: Sequence[Run]) -> str:
    """The least and the largest share of a draw's requests that met every objective."""
    shares = [run.attainment for run in draws]
    return f"{min(shares):.0%} to {max(shares):.0%}" if shares else "-"
