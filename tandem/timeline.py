"""The phases of a request, named once, and the marks that say when each was reached."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import StrEnum


class Phase(StrEnum):
    """In the order in which a request passes them; logs, metrics and pictures use these words."""

    RECEIVED = "received"
    ADMITTED = "admitted"
    RESERVED = "reserved"
    PREFILL_STARTED = "prefill_started"
    FIRST_TOKEN = "first_token"
    KV_SEALED = "kv_sealed"
    DECODE_STARTED = "decode_started"
    FINISHED = "finished"


@dataclass
class Timeline:
    """When one request reached each phase, in milliseconds since it was received, on one process's clock.

    Durations measured by other processes are placed on this clock relative to a mark made here (`mark(..., at_ms)`),
    so clocks of different machines never mix.
    """

    marks: dict[Phase, float] = field(default_factory=lambda: {Phase.RECEIVED: 0.0})
    _start_s: float = field(default_factory=time.monotonic)

    def now_ms(self) -> float:
        return (time.monotonic() - self._start_s) * 1000

    def mark(self, phase: Phase, at_ms: float | None = None) -> None:
        """Records the first time a phase is reached; later calls for the same phase change nothing."""
        self.marks.setdefault(phase, self.now_ms() if at_ms is None else at_ms)

    def correct(self, phase: Phase, at_ms: float) -> None:
        """For what was heard of late, when whoever was there says when it was."""
        self.marks[phase] = at_ms

    @property
    def phase(self) -> Phase:
        """The furthest phase reached."""
        return [phase for phase in Phase if phase in self.marks][-1]

    def between_ms(self, start: Phase, end: Phase) -> float | None:
        """Milliseconds from one phase to another, or None while either is missing."""
        if start in self.marks and end in self.marks:
            return self.marks[end] - self.marks[start]
        return None
