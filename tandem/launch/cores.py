"""Which cores each worker gets. Torch's OpenMP threads spin: workers that share a core run several times slower."""

from __future__ import annotations

import os
from itertools import pairwise


def share_cores(cores: list[int], workers: int) -> list[list[int]]:
    """Cores of each worker: its own, in even shares, or one in turn while there are fewer cores than workers."""
    if len(cores) < workers:
        return [[cores[index % len(cores)]] for index in range(workers)]
    bounds = [index * len(cores) // workers for index in range(workers + 1)]
    return [cores[low:high] for low, high in pairwise(bounds)]


def pin(cores: list[int]) -> None:
    """Keeps this process on these cores, where the system can. Must come before torch starts its threads."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
