"""Who was where in a window of time: each worker a group of rows, and in them the stays of requests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from loadtest.compare.html.interference import Window
from loadtest.compare.model import ShownAnswer, ShownRun
from tandem.timeline import Phase

Part = Literal["queued", "prefill", "handoff", "decode", "unknown"]

_MAX_ROWS = 60
_MIN_ROWS_OF_WORKER = 4


@dataclass(frozen=True)
class Span:
    part: Part
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Stay:
    """One request on one worker: a split answer has two."""

    # Its place in the run's answers.
    request: int
    worker: str
    spans: list[Span]
    # The arrivals of its tokens, and the wait before each; None before the first.
    ticks: list[tuple[float, float | None]]
    failed: bool = False

    @property
    def start_s(self) -> float:
        return self.spans[0].start_s

    @property
    def end_s(self) -> float:
        return max([self.spans[-1].end_s, *(at_s for at_s, _ in self.ticks)])

    def is_within(self, window: Window) -> bool:
        return self.end_s > window.start_s and self.start_s < window.end_s

    def works_within(self, window: Window) -> bool:
        """Does more than wait there."""
        busy = (span for span in self.spans if span.part != "queued")
        return any(span.end_s > window.start_s and span.start_s < window.end_s for span in busy)


@dataclass
class Lane:
    """The rows of one worker: no two stays of one row overlap."""

    worker: str
    rows: list[list[Stay]] = field(default_factory=list)

    def place_stay(self, stay: Stay, most_rows: int) -> bool:
        def is_free(row: list[Stay]) -> bool:
            return all(stay.end_s <= other.start_s or other.end_s <= stay.start_s for other in row)

        free = next(filter(is_free, self.rows), None)
        if free is None:
            if len(self.rows) >= most_rows:
                return False
            self.rows.append(free := [])
        free.append(stay)
        return True


@dataclass(frozen=True)
class Lanes:
    lanes: list[Lane]
    # Stays in the window for which there was no row.
    left_out: int


def lanes(run: ShownRun, window: Window) -> Lanes:
    """Requests that only wait get the rows that are left."""
    stays = (stay for index, answer in enumerate(run.answers) for stay in _stays_of(index, answer))
    there = [stay for stay in stays if stay.is_within(window)]
    there.sort(key=lambda stay: (not stay.works_within(window), stay.start_s))
    names = [use.worker for use in run.use]
    names += sorted({stay.worker for stay in there} - set(names))
    found = {name: Lane(name) for name in names}
    most_rows = max(_MIN_ROWS_OF_WORKER, _MAX_ROWS // max(1, len(names)))
    left_out = sum(not found[stay.worker].place_stay(stay, most_rows) for stay in there)
    return Lanes(list(found.values()), left_out)


def _stays_of(index: int, answer: ShownAnswer) -> Iterator[Stay]:
    spans, failed = list(_spans(answer)), answer.failure is not None
    befores = [None, *answer.arrivals_s]
    ticks = [
        (at, None if before is None else at - before) for before, at in zip(befores, answer.arrivals_s, strict=False)
    ]
    decode = [span for span in spans if span.part == "decode"]
    if answer.prefill_worker == answer.decode_worker or not decode:
        if spans:
            yield Stay(index, answer.prefill_worker, spans, ticks, failed)
        return
    first = [span for span in spans if span.part != "decode"]
    if first:
        yield Stay(index, answer.prefill_worker, first, ticks[:1])
    yield Stay(index, answer.decode_worker, decode, ticks[1:] if first else ticks, failed)


def _spans(answer: ShownAnswer) -> Iterator[Span]:
    """What its marks say; for an answer without marks, what the client saw."""
    marks = {name: answer.sent_s + at_ms / 1000 for name, at_ms in answer.phases_ms.items()}
    if not marks:
        if answer.arrivals_s:
            yield Span("unknown", answer.sent_s, answer.arrivals_s[-1])
        return
    decode_from = Phase.KV_SEALED if Phase.KV_SEALED in marks else Phase.FIRST_TOKEN
    edges: tuple[tuple[Part, Phase, Phase], ...] = (
        ("queued", Phase.RECEIVED, Phase.PREFILL_STARTED),
        ("prefill", Phase.PREFILL_STARTED, Phase.FIRST_TOKEN),
        ("handoff", Phase.FIRST_TOKEN, Phase.KV_SEALED),
        ("decode", decode_from, Phase.FINISHED),
    )
    for part, start, end in edges:
        if start in marks and end in marks:
            yield Span(part, marks[start], marks[end])
