"""The report of a comparison: one HTML file that needs nothing else, opened from a disk or sent to somebody.

Whatever comes from users (names, commands) is escaped by the template, and inside plots by `figure.plain`; the page's
content policy names its two scripts by hash, so nothing else runs or is loaded.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from loadtest.compare.html import distributions, facts, goodput, story, utilisation
from loadtest.compare.html.figure import Drawn, Figure, drawn
from loadtest.compare.model import Comparison


def render(comparison: Comparison) -> str:
    """The whole page."""
    shapes = drawn(comparison)
    content = _content(comparison, shapes)
    figures = json.dumps([figure.as_json() for figure in _figures(content)], separators=(",", ":"), allow_nan=False)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    scripts = [_script(_plotly_source()), _script(_file("page.js"))]
    return environment.from_string(_file("page.html")).render(
        **content,
        told=_Told.of(comparison),
        comparison=comparison,
        style=Markup(_file("page.css")),
        policy=_policy(scripts),
        figures_json=Markup(figures.replace("<", "\\u003c")),  # it cannot end the element that it stands in
        scripts=[Markup(script) for script in scripts],
    )


@dataclass(frozen=True)
class _Told:
    """The verdict's sentences by their places in the page."""

    headline: str
    # What the headline stands on.
    lead: str
    rest: list[str]
    # That the comparison was interrupted.
    notice: str | None

    @classmethod
    def of(cls, comparison: Comparison) -> _Told:
        sentences, notice = comparison.verdict.text, None
        if comparison.interrupted and len(sentences) > 1:
            notice, *sentences = sentences
        headline, colon, lead = sentences[0].partition(": ")
        if colon:
            headline, lead = f"{headline}.", lead[:1].upper() + lead[1:]
        return cls(headline, lead, sentences[1:], notice)


def _content(comparison: Comparison, shapes: list[Drawn]) -> dict[str, Any]:
    rates = distributions.shown_rates(shapes)
    return {
        "shapes": shapes,
        "shown": [each for each in shapes if each.measured.shown],
        "facts": facts.facts(comparison),
        "objectives": facts.objectives(comparison),
        "limits": facts.limits(shapes, comparison),
        "rows": goodput.table(shapes, comparison.target_attainment),
        "draws": goodput.draws(shapes, comparison.target_attainment),
        "attainment": goodput.attainment(shapes, comparison),
        "distributions": distributions.distributions(shapes, comparison),
        "story": story.story(shapes, comparison),
        "utilisation": utilisation.utilisation(shapes),
        "workers": utilisation.workers(shapes),
        "rates": rates,
        "drawn": [each for each in shapes if each.measured.draws],
    }


def _figures(content: dict[str, Any]) -> list[Figure]:
    told = content["story"]
    return [
        content["draws"],
        content["attainment"],
        *(figure for each in content["distributions"] for figure in each.figures),
        *(picture.figure for picture in (told.pictures if told else [])),
        *content["utilisation"],
    ]


def _script(source: str) -> str:
    # Inside JavaScript's strings, the only place where it can stand, `<\/` is the same.
    return source.replace("\r\n", "\n").replace("</script", "<\\/script")


def _policy(scripts: list[str]) -> str:
    digests = (hashlib.sha256(script.encode()).digest() for script in scripts)
    hashes = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    return f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:"


_plotly_source = cache(get_plotlyjs)


@cache
def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
