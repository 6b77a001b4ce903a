"""How long a transfer was worked on, and how much of that lay before the end of prefill."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class WorkTime:
    """Spans of work, one after another, on time.monotonic's clock."""

    def __init__(self) -> None:
        self._spans: list[tuple[float, float]] = []

    @contextmanager
    def measure(self) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self._spans.append((started, time.monotonic()))

    @property
    def seconds(self) -> float:
        return sum(end - start for start, end in self._spans)

    def before(self, moment: float | None) -> float:
        """Seconds that lay before it; all, if it is not known."""
        if moment is None:
            return self.seconds
        return sum(max(0.0, min(end, moment) - start) for start, end in self._spans)
