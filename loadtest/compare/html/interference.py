"""Prefill interference: what answers wait for their next token while another prompt is computed on their worker."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loadtest.compare.model import ShownAnswer, ShownRun
from tandem.timeline import Phase

Floats = npt.NDArray[np.float64]

# A window is wide enough for the pattern, and narrow enough that single tokens can be told apart.
_MIN_TOKENS, _MAX_TOKENS = 40, 110
_WINDOW_PREFILLS = 4.0
_CANDIDATES = 40


@dataclass(frozen=True)
class Waits:
    """Every wait between two arrivals of one answer, of all answers of a run; seconds on the client's clock."""

    start_s: Floats
    end_s: Floats
    # Most of it lies within prefills of other requests on the worker that decodes.
    disturbed: npt.NDArray[np.bool_]

    @property
    def ms(self) -> Floats:
        return (self.end_s - self.start_s) * 1000

    def within(self, start_s: float, end_s: float) -> Waits:
        """Those that at least touch this time."""
        inside = (self.end_s > start_s) & (self.start_s < end_s)
        return Waits(self.start_s[inside], self.end_s[inside], self.disturbed[inside])

    def __len__(self) -> int:
        return len(self.start_s)


@dataclass(frozen=True)
class Window:
    start_s: float
    length_s: float

    @property
    def end_s(self) -> float:
        return self.start_s + self.length_s


def prefill_span(answer: ShownAnswer) -> tuple[float, float] | None:
    """From its first chunk to its first token; the router accepts a request when the client has sent it."""
    start_ms, end_ms = (answer.phases_ms.get(phase) for phase in (Phase.PREFILL_STARTED, Phase.FIRST_TOKEN))
    if start_ms is None or end_ms is None:
        return None
    return answer.sent_s + start_ms / 1000, answer.sent_s + end_ms / 1000


def prefills(answers: Sequence[ShownAnswer]) -> dict[str, list[tuple[float, float]]]:
    """When each worker computed prompts: disjoint spans, in order."""
    spans: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for answer in answers:
        if (span := prefill_span(answer)) is not None:
            spans[answer.prefill_worker].append(span)
    return {worker: _merged(sorted(each)) for worker, each in spans.items()}


def _merged(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    merged: list[tuple[float, float]] = []
    for start, end in spans:
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def waits(answers: Sequence[ShownAnswer]) -> Waits:
    busy = prefills(answers)
    starts, ends, shares = [np.empty(0)], [np.empty(0)], [np.empty(0)]
    for answer in answers:
        times = np.asarray(answer.arrivals_s, dtype=float)
        if answer.failure is None and len(times) > 1:
            starts.append(times[:-1])
            ends.append(times[1:])
            # An answer's own prefill ends with its first token: it never covers one of its waits.
            covered = np.diff(_covered_s(busy.get(answer.decode_worker, ()), times))
            shares.append(covered / np.maximum(np.diff(times), 1e-9))
    return Waits(np.concatenate(starts), np.concatenate(ends), np.concatenate(shares) > 0.5)


def _covered_s(spans: Sequence[tuple[float, float]], times: Floats) -> Floats:
    """How many seconds of the spans lie before each time."""
    if not spans:
        return np.zeros_like(times)
    edges = np.asarray(spans).ravel()
    lengths = np.diff(edges)
    lengths[1::2] = 0.0
    before: Floats = np.interp(times, edges, np.concatenate([[0.0], np.cumsum(lengths)]))
    return before


def worst_window(run: ShownRun) -> Window:
    """Where disturbed answers lost the most time together."""
    found = waits(run.answers)
    length_s = _window_s(run, found)
    calm = found.ms[~found.disturbed]
    excess = np.where(found.disturbed, found.ms - (np.median(calm) if len(calm) else 0.0), 0.0).clip(min=0)
    if not excess.any():
        return busiest_window(run, length_s)
    middles = (found.start_s + found.end_s) / 2

    def telling(start_s: float) -> float:
        """What was lost there; a window that has calm tokens too shows the difference."""
        lost = excess[(middles > start_s) & (middles < start_s + length_s)]
        return float(lost.sum() * (0.1 + min(0.25, (lost == 0).mean())))

    starts = middles[np.argsort(excess)[-_CANDIDATES:]] - length_s / 2
    return Window(max(0.0, float(max(starts, key=telling))), length_s)


def busiest_window(run: ShownRun, length_s: float) -> Window:
    """Where most tokens came."""
    arrivals = np.sort(np.concatenate([np.empty(0), *(answer.arrivals_s for answer in run.answers)]))
    if not len(arrivals):
        return Window(0.0, length_s)
    counts = np.searchsorted(arrivals, arrivals + length_s) - np.arange(len(arrivals))
    return Window(max(0.0, float(arrivals[int(np.argmax(counts))])), length_s)


def _window_s(run: ShownRun, found: Waits) -> float:
    """Some prefills long, but of so many tokens that their ticks stay apart."""
    token_s = float(np.median(found.ms)) / 1000 if len(found) else 0.02
    spans = [end - start for start, end in filter(None, map(prefill_span, run.answers))]
    wanted_s = _WINDOW_PREFILLS * float(np.median(spans)) if spans else 0.0
    return float(np.clip(wanted_s, _MIN_TOKENS * token_s, _MAX_TOKENS * token_s).clip(0.05, max(0.05, run.duration_s)))
