"""`python -m lost_device_worker worker ...`: a worker whose device is lost in the step of a prompt of 13 tokens."""

from __future__ import annotations

from typing import Any

import torch

from tandem.cli.main import main
from tandem.engine.model_runner import ModelRunner
from tandem.engine.scheduler import StepPlan

run = ModelRunner.run


def lost(self: ModelRunner, plan: StepPlan, *rest: Any) -> Any:
    if any(chunk.sequence.prompt_len == 13 for chunk in plan.chunks):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    return run(self, plan, *rest)


ModelRunner.run = lost  # type: ignore[method-assign,assignment]

if __name__ == "__main__":
    main()
