"""The timeline section: which shapes, rate and window it shows, and what is to be seen there, in words with figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loadtest.compare.html.distributions import at_rate
from loadtest.compare.html.figure import Drawn, Figure, Look
from loadtest.compare.html.gantt import gantt
from loadtest.compare.html.goodput import milliseconds
from loadtest.compare.html.interference import Waits, Window, busiest_window, waits, worst_window
from loadtest.compare.model import Comparison, ShownRun

# Waits that differ by less: neither is called the longer one.
_AS_LONG = 1.05


@dataclass(frozen=True)
class Picture:
    figure: Figure
    look: Look
    # What to look at, and how the window was chosen.
    caption: str
    left_out: int


@dataclass(frozen=True)
class WaitRow:
    """All waits between tokens of one shape at the rate of the timeline."""

    look: Look
    count: str
    # Share of the time of all waits: in waits during prefills of others on the same worker.
    share: str
    median_disturbed: str
    median_calm: str
    p99: str
    longest: str


@dataclass(frozen=True)
class Story:
    rate_rps: float
    window_s: float
    sentences: list[str]
    pictures: list[Picture]
    rows: list[WaitRow]


@dataclass(frozen=True)
class _Scene:
    drawn: Drawn
    run: ShownRun
    waits: Waits
    window: Window

    @property
    def name(self) -> str:
        return self.drawn.look.name

    @property
    def longest_ms(self) -> float | None:
        there = self.waits.within(self.window.start_s, self.window.end_s)
        return float(there.ms.max()) if len(there) else None


def story(shapes: Sequence[Drawn], comparison: Comparison) -> Story | None:
    """None when no run was kept."""
    verdict = comparison.verdict
    chosen = [
        each
        for split, name in ((False, verdict.best_colocated), (True, verdict.best_split))
        if (each := _named([s for s in shapes if s.measured.shape.is_split is split], name))
    ]
    rate_rps = _rate(chosen)
    if rate_rps is None:
        return None
    scenes = _scenes(chosen, rate_rps)
    rows = [_wait_row(each, run) for each in shapes if (run := at_rate(each, rate_rps))]
    return Story(
        rate_rps, scenes[0].window.length_s, _sentences(scenes), [_picture(each, scenes) for each in scenes], rows
    )


def _named(shapes: Sequence[Drawn], name: str) -> Drawn | None:
    """The one with the name if answers of it were kept, else the first with answers."""
    kept = [each for each in shapes if any(run.answers for run in each.measured.shown)]
    return next((each for each in kept if each.look.name == name), kept[0] if kept else None)


def _rate(chosen: Sequence[Drawn]) -> float | None:
    """The highest that all of them ran at and kept: beyond, all that shows is a queue."""
    rates = [{run.rate_rps for run in each.measured.shown if run.answers} for each in chosen]
    common = set.intersection(*rates) if rates else set()
    bests = [best_rps for each in chosen if (best_rps := each.measured.best_rate_rps)]
    kept = [rate for rate in common if bests and rate <= 1.001 * min(bests)]
    return max(kept) if kept else min(common or set.union(*rates, set()), default=None)


def _scenes(chosen: Sequence[Drawn], rate_rps: float) -> list[_Scene]:
    """The colocated shape decides on the window; the split one shows the same seconds if its requests are the same."""
    runs = [(each, run) for each in chosen if (run := at_rate(each, rate_rps))]
    first = runs[0][1]
    window, scenes = worst_window(first), []
    for each, run in runs:
        found = waits(run.answers)
        same = _asked(run) == _asked(first) and len(found.within(window.start_s, window.end_s)) > 0
        scenes.append(_Scene(each, run, found, window if same else busiest_window(run, window.length_s)))
    return scenes


def _asked(run: ShownRun) -> list[tuple[float, int]]:
    return [(round(answer.scheduled_s, 3), answer.prompt_tokens) for answer in run.answers]


def _picture(scene: _Scene, scenes: Sequence[_Scene]) -> Picture:
    figure, left_out = gantt(scene.drawn, scene.run, scene.window)
    when = f"{scene.window.start_s:.2f} to {scene.window.end_s:.2f} s of the run"
    if scene is scenes[0]:
        why = "where decoding lost most to prefills" if _is_disturbed(scene) else "where most tokens came"
    elif scene.window == scenes[0].window:
        why = "the same seconds of the same schedule"
    else:
        why = "where most tokens came"
    return Picture(figure, scene.drawn.look, f"{when}: {why}.", left_out)


def _is_disturbed(scene: _Scene) -> bool:
    return bool(scene.waits.within(scene.window.start_s, scene.window.end_s).disturbed.any())


def _sentences(scenes: Sequence[_Scene]) -> list[str]:
    first = scenes[0]
    said = []
    if first.drawn.measured.shape.is_split:
        said.append("No colocated run was kept, so there is nothing to compare these seconds with.")
    elif _is_disturbed(first):
        said.append(
            "Look at the shaded bands: there the worker computes a prompt, and the ticks of the answers that it "
            "decodes meanwhile move apart. That is prefill interference. On a worker that only decodes there are "
            "no bands."
        )
    else:
        said.append(f"In this run of {first.name} no prefill held up an answer for most of a wait.")
    found = [(each.name, each.longest_ms) for each in scenes]
    if all(longest is not None for _, longest in found):
        each_said = " against ".join(f"{milliseconds(longest or 0)} ms with {name}" for name, longest in found)
        said.append(f"Longest wait for a next token in the window: {each_said}.{_but(scenes)}")
    return said


def _but(scenes: Sequence[_Scene]) -> str:
    """What not to read into the picture."""
    longest = [scene.longest_ms or 0.0 for scene in scenes]
    if len(longest) < 2 or longest[1] < longest[0]:
        return ""
    more = "longer" if longest[1] > _AS_LONG * longest[0] else "as long"
    return f" So {scenes[1].name} waits {more} here, though for no prefill on the worker that decodes."


def _at_most(found: Waits, percentile: float) -> str:
    return milliseconds(float(np.percentile(found.ms, percentile))) if len(found) else "–"


def _wait_row(drawn: Drawn, run: ShownRun) -> WaitRow:
    found = waits(run.answers)
    return WaitRow(
        drawn.look,
        f"{len(found):,}",
        f"{found.ms[found.disturbed].sum() / found.ms.sum():.0%}" if found.ms.any() else "–",
        _median(found.ms[found.disturbed]),
        _median(found.ms[~found.disturbed]),
        _at_most(found, 99),
        _at_most(found, 100),
    )


def _median(values: np.ndarray) -> str:
    return milliseconds(float(np.median(values))) if len(values) else "–"
