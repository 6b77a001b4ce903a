"""The cores of this process. No torch: those that start and pin processes ask before they import it."""

from __future__ import annotations

import os


def usable_cores() -> list[int]:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
