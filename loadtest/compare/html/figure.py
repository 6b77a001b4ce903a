"""One plot of the page: what plotly.js draws, as plain data. Colours are names of the page's CSS, light and dark."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from loadtest.compare.model import Comparison, Measured


@dataclass(frozen=True)
class Figure:
    # Name of its element in the page.
    id: str
    # What it shows, for those who do not see it.
    label: str
    height_px: int
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    # Above the plot.
    title: str = ""

    def as_json(self) -> dict[str, Any]:
        return {"id": self.id, "data": self.data, "layout": self.layout}


@dataclass(frozen=True)
class Look:
    """How a shape is drawn, on the whole page. The dash and the marker tell what a colour alone might not."""

    name: str
    colour: str
    dash: str
    symbol: str

    @property
    def dash_array(self) -> str:
        """For SVG, as long as plotly's."""
        return {"solid": "none", "dash": "7 5", "dot": "2 4"}[self.dash]

    @property
    def line(self) -> dict[str, Any]:
        return {"color": f"var({self.colour})", "dash": self.dash, "width": 2}


@dataclass(frozen=True)
class Drawn:
    """A shape with what was measured, and its look."""

    measured: Measured
    look: Look
    # Short and unique: for the ids of elements.
    key: str = field(compare=False)


# Colours of each kind: cool for colocated shapes, warm for split ones (Okabe and Ito's, which colour-blind people tell
# apart). After the last, they begin again with another dash.
_COLOURS = 3
_DASHES = ("solid", "dash", "dot")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "hexagon", "triangle-down")


def drawn(comparison: Comparison) -> list[Drawn]:
    """Every shape, in the order in which it was measured."""
    counts, found = {True: 0, False: 0}, []
    for index, measured in enumerate(comparison.measured):
        split = measured.shape.is_split
        place = counts[split]
        colour = f"--{'warm' if split else 'cool'}-{place % _COLOURS}"
        dash = _DASHES[place // _COLOURS % len(_DASHES)]
        # Split and colocated shapes never share a marker before there are many of both.
        look = Look(measured.shape.name, colour, dash, _SYMBOLS[(2 * place + split) % len(_SYMBOLS)])
        found.append(Drawn(measured, look, f"shape-{index}"))
        counts[split] += 1
    return found


def requests_per_s(rate_rps: float) -> str:
    return f"{rate_rps:.2f} requests/s"


def plain(text: str) -> str:
    """Text of a user inside a plot, where plotly reads tags and some entities; not quotes."""
    return html.escape(text, quote=False)


def log_axis(least: float, most: float, title: str) -> dict[str, Any]:
    """Labelled at 1, 2, 5, 10, ...; a short one at more: plotly's own labels repeat bare digits."""
    low, high = math.log10(least) - 0.05, math.log10(most) + 0.05
    steps = (1, 2, 5) if high - low > 1.2 else (1, 1.5, 2, 3, 4, 5, 7)
    ticks = [step * 10.0**decade for decade in range(math.floor(low), math.ceil(high)) for step in steps]
    return {
        "type": "log",
        "range": [low, high],
        "title": {"text": title},
        "tickvals": ticks,
        "ticktext": [f"{tick:,.6g}" for tick in ticks],
    }


def rate_axis(rates: Sequence[float]) -> dict[str, Any]:
    """The search goes by factors, and so does the axis."""
    return log_axis(min(rates, default=1.0), max(rates, default=10.0), "offered requests/s")


def rounded(values: Iterable[float] | np.ndarray, digits: int = 4) -> list[float]:
    """To so many significant digits: a plot shows no more, and the page stays small."""
    return [float(f"{value:.{digits}g}") for value in values]


def thinned(values: Sequence[float], most: int) -> tuple[list[float], list[float]]:
    """Values in order and the share of values up to each, at no more than so many evenly spaced shares."""
    ordered = np.sort(np.asarray(values, dtype=float))
    count = len(ordered)
    ranks = np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))
    return rounded(ordered[ranks]), rounded((ranks + 1) / count)
