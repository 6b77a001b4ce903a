"""The zoo's table in docs/models.md, between two markers."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import transformers
from zoo_result import Result

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- the zoo's table: `make zoo` writes it -->\n", "<!-- end of the zoo's table -->\n"
# Of features that share a reason.
_NAMED = 3


def write(results: list[Result]) -> None:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, marker, after = rest.partition(END)
    assert marker, f"{PAGE} has no markers"
    PAGE.write_text(before + BEGIN + _text(results) + END + after)


def _text(results: list[Result]) -> str:
    by_architecture: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        by_architecture[result.architecture].append(result)
    return "\n".join(
        [
            _sum(results, by_architecture),
            "",
            "| architecture | exact | refused | what is refused, and why |",
            "| --- | --: | --: | --- |",
            *(_row(name, each) for name, each in sorted(by_architecture.items())),
            "",
        ]
    )


def _sum(results: list[Result], by_architecture: dict[str, list[Result]]) -> str:
    outcomes = [result.outcome for result in results]
    refused, unmade = outcomes.count("refused"), outcomes.count("no model")
    served = sum(any(result.outcome == "exact" for result in each) for each in by_architecture.values())
    exact = outcomes.count("exact")
    return (
        f"transformers {transformers.__version__}: {len(by_architecture)} architectures, of which {served} are served; "
        f"{len(results)} trials: {exact} exact, {refused} refused, {unmade} of which transformers makes no model that "
        f"generates, {len(results) - exact - refused - unmade} wrong or broken."
    )


def _row(architecture: str, results: list[Result]) -> str:
    counts = {outcome: sum(result.outcome == outcome for result in results) for outcome in ("exact", "refused")}
    reasons: dict[str, list[str]] = defaultdict(list)
    for result in results:
        if result.outcome not in ("exact", "no model"):
            loud = "" if result.outcome == "refused" else f"**{result.outcome}**: "
            reasons[loud + result.words].append(result.feature)
    told = [_told(reason, features, len(results)) for reason, features in reasons.items()]
    if not counts["exact"] and not reasons:
        told = [f"transformers makes no model that generates: {results[0].words}"]
    return f"| {architecture} | {counts['exact']} | {counts['refused']} | {_cell('; '.join(told))} |"


def _told(reason: str, features: list[str], trials: int) -> str:
    if "as it is" in features:
        return reason
    more = f" and {len(features) - _NAMED} more" if len(features) > _NAMED else ""
    return f"{', '.join(features[:_NAMED])}{more}: {reason}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
