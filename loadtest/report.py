"""The figures for a person, as rich tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_ROWS = (
    ("TTFT", "ttft", "from sending", ()),
    ("TTFT", "ttft", "from schedule", ("from_schedule",)),
    ("TPOT", "tpot", "", ()),
    ("ITL", "itl", "", ()),
    ("E2EL", "e2el", "from sending", ()),
    ("E2EL", "e2el", "from schedule", ("from_schedule",)),
    ("client queue", "client_queue_time", "schedule to sending", ()),
)


def report(figures: dict[str, Any], percentiles: Sequence[float]) -> RenderableType:
    counts = Table.grid(padding=(0, 2))
    for label, value in _lines(figures):
        counts.add_row(label, Text(value))  # not markup: a server's words may be in it
    return Group(counts, Text(), _latencies(figures, percentiles))


def _lines(figures: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if figures["interrupted"]:
        yield "interrupted", f"{figures['not_offered']} requests were not offered any more"
    offered = f"{figures['offered']}, of which {figures['completed']} answered and {figures['failed']} failed"
    yield "offered requests", offered
    for kind, count in sorted(figures["failures"].items()):
        yield f"  failed: {kind}", f"{count}, the first: {figures['first_errors'][kind]}"
    if figures["left_out"]:
        yield "left out", f"{figures['left_out']} requests are longer than the model allows"
    yield "duration", f"{figures['duration']:.2f} s"
    yield "tokens", f"{figures['total_input_tokens']} in, {figures['total_output_tokens']} out"
    yield "request throughput", f"{figures['request_throughput']:.2f} requests/s"
    yield "output throughput", f"{figures['output_throughput']:.1f} tokens/s"
    yield "total token throughput", f"{figures['total_token_throughput']:.1f} tokens/s"
    yield "most in one second", f"{figures['max_concurrent_requests']} requests under way"
    if figures["goodput"]:
        yield from _goodput_lines(figures)


def _goodput_lines(figures: dict[str, Any]) -> Iterator[tuple[str, str]]:
    limits = ", ".join(f"{name} ≤ {limit:g} ms" for name, limit in figures["goodput"].items())
    for label, found in (("from sending", figures), ("from schedule", figures["from_schedule"])):
        goodput, attainment = found["request_goodput"], found["attainment"]
        share = "none was offered" if attainment is None else f"attainment {attainment:.1%} of offered"
        yield f"goodput {label}", f"{goodput:.2f} requests/s, {share} ({limits})"


def _latencies(figures: dict[str, Any], percentiles: Sequence[float]) -> Table:
    heads = ["mean", "median", *(f"p{percentile:g}" for percentile in percentiles if percentile != 50)]
    table = Table("ms", "", box=None, padding=(0, 2))
    for head in heads:
        table.add_column(head, justify="right")
    for label, name, clock, path in _ROWS:
        found = figures[path[0]] if path else figures
        milliseconds = [found[f"{head}_{name}_ms"] for head in heads]
        # A dash where there was nothing to measure.
        table.add_row(label, clock, *("-" if value is None else f"{value:.2f}" for value in milliseconds))
    return table
