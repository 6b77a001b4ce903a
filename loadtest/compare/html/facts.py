"""What was compared, and how far the figures carry, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime

from loadtest.compare.html.figure import Drawn
from loadtest.compare.html.goodput import stopped_early
from loadtest.compare.model import Comparison, Run

_UNITS = {"ttft": "TTFT", "tpot": "TPOT", "e2el": "E2EL"}


def facts(comparison: Comparison) -> list[tuple[str, str]]:
    machine = comparison.machine
    where = f"{machine.processor}, {machine.cores} cores, {machine.memory_gib:.1f} GiB of memory"
    return [
        ("Machine", where if machine.device == "cpu" else f"{where}; workers on {machine.device}"),
        ("Model", comparison.model),
        ("Workload", "; ".join(_workload(comparison))),
        ("Objectives", objectives(comparison)),
        ("Date", f"{_date(comparison.date)}, Tandem {comparison.tandem_version}"),
    ]


def _date(text: str) -> str:
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        return text
    return f"{when:%Y-%m-%d %H:%M %Z}".strip()


def objectives(comparison: Comparison) -> str:
    limits = []
    for name, limit_ms in comparison.objectives.items():
        times = comparison.times_alone.get(name)
        alone = "" if times is None else f" ({times:g} times what an answer takes alone)"
        limits.append(f"{_UNITS.get(name, name)} ≤ {limit_ms:g} ms{alone}")
    share = f"{comparison.target_attainment:.0%} of the requests that were offered"
    return f"{' and '.join(limits) or 'none'}, kept for {share}"


def _workload(comparison: Comparison) -> Iterator[str]:
    """A sentence for the lengths; what else is not said elsewhere, by its own name."""
    left = dict(comparison.workload)
    kind, source = left.pop("workload", "unknown"), left.pop("source", None)
    lengths = [left.pop(name, None) for name in ("input_tokens", "output_tokens")]
    yield f"{kind}" if source in (None, "drawn") else f"{kind} ({source})"
    if None not in lengths:
        ratio = left.pop("range_ratio", 0)
        spread = f", each ± {ratio:.0%}" if ratio else ""
        yield f"prompts of {lengths[0]} tokens, answers of {lengths[1]}{spread}"
    # The rate is what the comparison varies.
    unsaid = {name: value for name, value in left.items() if value not in (None, 0) and name != "request_rate"}
    yield from (f"{name.replace('_', ' ')} {value}" for name, value in unsaid.items())


def limits(shapes: Sequence[Drawn], comparison: Comparison) -> list[str]:
    """How sure the figures are."""
    runs = [run for each in shapes for run in each.measured.probes]
    said = [_counted(shapes, runs)]
    whole = [run for run in runs if not stopped_early(run)]
    if whole:
        fewest = min(run.offered for run in whole) or 1
        if fewest < 300:
            said.append("The 99th percentile of so few requests is close to the slowest one.")
    said.append(_failures(runs))
    if comparison.machine.device != "cpu":
        said.append("Busy shares are those of the processor; what a GPU does is not in them.")
    return said


def _failures(runs: Sequence[Run]) -> str:
    """Those that a stopped run cancelled are not meant."""
    kinds = Counter[str]()
    for run in runs:
        kinds.update(run.figures.get("failures", {}))
    del kinds["interrupted"]
    if not kinds:
        return "No request failed in the search."
    words = ", ".join(f"{name.replace('_', ' ')}: {count}" for name, count in sorted(kinds.items()))
    return f"Requests that failed in the search, and count as missed: {words}."


def _counted(shapes: Sequence[Drawn], runs: Sequence[Run]) -> str:
    draws = [run for each in shapes for run in each.measured.draws]
    offered = sum(run.offered for run in [*runs, *draws])
    early = sum(map(stopped_early, runs))
    return (
        f"{len(shapes)} shapes, {len(runs)} runs of the search ({early} of them stopped early) and {len(draws)} of "
        f"the draws: {offered:,} requests in all."
    )
