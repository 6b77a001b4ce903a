"""The timeline of a window: requests on their workers, and a tick for each arrival of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, get_args

from loadtest.compare.html.figure import Drawn, Figure, plain
from loadtest.compare.html.interference import Window, prefills
from loadtest.compare.html.lanes import Lane, Lanes, Part, Span, Stay, lanes
from loadtest.compare.model import ShownAnswer, ShownRun

_ROW_PX, _MARGIN_PX = 15, 46
# In rows: above each worker, for its name.
_HEAD = 1.5


def gantt(drawn: Drawn, run: ShownRun, window: Window) -> tuple[Figure, int]:
    """The picture, and how many requests in the window have no row in it."""
    found = lanes(run, window)
    # Where each lane's head begins, and where the last one ends.
    tops = list(accumulate((_HEAD + max(1, len(lane.rows)) + 0.3 for lane in found.lanes), initial=0.0))
    rows = tops[-1]
    bars = _bars(found, tops, run.answers, window)
    layout = {
        "barmode": "overlay",
        "xaxis": {
            "range": [0, _ms(window.length_s)],
            "title": {"text": "ms from the beginning of the window"},
            "zeroline": False,
        },
        "yaxis": {"range": [rows, -0.2], "visible": False, "fixedrange": True},
        "margin": {"l": 8, "r": 8, "t": 6, "b": 40},
        "shapes": list(_bands(found, tops, run, window)),
        "annotations": [_name(lane, top, run) for lane, top in zip(found.lanes, tops, strict=False)],
        "hovermode": "closest",
    }
    label = f"Timeline of {drawn.look.name}: requests on each worker, by phase, and the arrivals of tokens"
    height_px = round(rows * _ROW_PX) + _MARGIN_PX
    data = [*bars, _ticks(found, tops, window), *_failures(found, tops, window)]
    return Figure(f"timeline-{drawn.key}", label, height_px, data, layout, drawn.look.name), found.left_out


def _placed(found: Lanes, tops: Sequence[float]) -> Iterator[tuple[Stay, float]]:
    """Every stay, and the middle of its row."""
    for lane, top in zip(found.lanes, tops, strict=False):
        for index, row in enumerate(lane.rows):
            for stay in row:
                yield stay, top + _HEAD + index + 0.5


def _bars(
    found: Lanes, tops: Sequence[float], answers: Sequence[ShownAnswer], window: Window
) -> Iterator[dict[str, Any]]:
    """One trace for each phase."""
    spans: dict[Part, list[tuple[Stay, Span, float]]] = {part: [] for part in get_args(Part)}
    for stay, row in _placed(found, tops):
        for span in stay.spans:
            if span.end_s > window.start_s and span.start_s < window.end_s:
                spans[span.part].append((stay, span, row))
    for part, each in spans.items():
        if each:
            yield _bar(part, each, answers, window)


def _bar(
    part: Part, spans: Sequence[tuple[Stay, Span, float]], answers: Sequence[ShownAnswer], window: Window
) -> dict[str, Any]:
    edges = [(max(span.start_s, window.start_s), min(span.end_s, window.end_s)) for _, span, _ in spans]
    return {
        "type": "bar",
        "orientation": "h",
        "name": part,
        "base": [_ms(start - window.start_s) for start, _ in edges],
        "x": [_ms(end - start) for start, end in edges],
        "y": [row for _, _, row in spans],
        "width": 0.34 if part == "queued" else 0.66,
        "marker": {"color": f"var(--phase-{part})", "line": {"width": 0}},
        "customdata": [_told(stay, span, answers[stay.request]) for stay, span, _ in spans],
        "hovertemplate": "%{customdata}<extra></extra>",
    }


def _told(stay: Stay, span: Span, answer: ShownAnswer) -> str:
    tokens = f"{answer.prompt_tokens} tokens in, {answer.output_tokens} out"
    return f"request {stay.request + 1} ({tokens})<br>{span.part}: {_ms(span.end_s - span.start_s):g} ms"


def _ticks(found: Lanes, tops: Sequence[float], window: Window) -> dict[str, Any]:
    ticks = [
        (
            at_s - window.start_s,
            row,
            f"request {stay.request + 1}: " + ("first token" if wait_s is None else f"token after {_ms(wait_s):g} ms"),
        )
        for stay, row in _placed(found, tops)
        for at_s, wait_s in stay.ticks
        if window.start_s <= at_s <= window.end_s
    ]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "token",
        "x": [_ms(at_s) for at_s, _, _ in ticks],
        "y": [row for _, row, _ in ticks],
        "marker": {"symbol": "line-ns", "size": 9, "line": {"width": 1.4, "color": "var(--tick)"}},
        "customdata": [told for _, _, told in ticks],
        "hovertemplate": "%{customdata}<extra></extra>",
    }


def _failures(found: Lanes, tops: Sequence[float], window: Window) -> Iterator[dict[str, Any]]:
    ends = [(stay, row) for stay, row in _placed(found, tops) if stay.failed and stay.end_s <= window.end_s]
    if ends:
        yield {
            "type": "scatter",
            "mode": "markers",
            "name": "failed",
            "x": [_ms(stay.end_s - window.start_s) for stay, _ in ends],
            "y": [row for _, row in ends],
            "marker": {"symbol": "x", "size": 8, "color": "var(--failed)"},
            "customdata": [f"request {stay.request + 1} failed" for stay, _ in ends],
            "hovertemplate": "%{customdata}<extra></extra>",
        }


def _bands(found: Lanes, tops: Sequence[float], run: ShownRun, window: Window) -> Iterator[dict[str, Any]]:
    """Behind the rows of a worker that decodes: the times when it computed prompts too."""
    busy = prefills(run.answers)
    decoders = {answer.decode_worker for answer in run.answers}
    for lane, top, bottom in zip(found.lanes, tops, tops[1:], strict=False):
        for start_s, end_s in busy.get(lane.worker, ()) if lane.worker in decoders else ():
            if end_s > window.start_s and start_s < window.end_s:
                yield {
                    "type": "rect",
                    "layer": "below",
                    "x0": max(0.0, _ms(start_s - window.start_s)),
                    "x1": min(_ms(window.length_s), _ms(end_s - window.start_s)),
                    "y0": top + _HEAD - 0.1,
                    "y1": bottom - 0.2,
                    "fillcolor": "var(--band)",
                    "line": {"width": 0},
                }


def _name(lane: Lane, top: float, run: ShownRun) -> dict[str, Any]:
    pools = {use.worker: use.pool for use in run.use}
    said = f"<b>{plain(lane.worker) or 'worker unknown'}</b>"
    pool = pools.get(lane.worker, "")
    return {
        "text": said if pool in lane.worker else f"{said} · {pool}",
        "x": 0,
        "xref": "paper",
        "xanchor": "left",
        "y": top + 0.85,
        "yref": "y",
        "yanchor": "middle",
        "showarrow": False,
        "font": {"size": 12},
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)
