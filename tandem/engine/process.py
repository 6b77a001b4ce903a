"""Settings of the whole process that an engine wants; entry points call this once, before the model is loaded."""

from __future__ import annotations

import os

import torch

from tandem.config import EngineConfig
from tandem.engine.cpu_memory import tune_allocator


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def tune_process(config: EngineConfig) -> None:
    """Threads as configured (one per usable core by default), and an allocator that keeps its memory."""
    torch.set_num_threads(config.threads or usable_cores())
    if config.device == "cpu":
        tune_allocator()
