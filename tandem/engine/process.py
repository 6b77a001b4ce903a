"""Settings of the whole process that an engine wants; entry points call this once, before the model is loaded."""

from __future__ import annotations

import torch

from tandem.config import EngineConfig
from tandem.engine.backends.cores import usable_cores
from tandem.engine.backends.cpu.memory import tune_allocator


def tune_process(config: EngineConfig) -> None:
    """Threads as configured (one per usable core by default), and an allocator that keeps its memory."""
    torch.set_num_threads(config.threads or len(usable_cores()))
    if config.device == "cpu":
        tune_allocator()
