"""What becomes of a step for which the device has no room: it is done in parts, and steps are smaller for a while."""

from __future__ import annotations

import logging

from tandem.engine.backends.backend import Backend
from tandem.engine.scheduler import Scheduler, StepPlan

log = logging.getLogger(__name__)

# Smaller steps take so little that what was in their way was something else, and passes.
LEAST_TOKENS = 64
# After so many steps with room in a row, steps may be twice as large again: want of memory may pass, and where it
# does not, one step in so many is done twice.
GOOD_STEPS = 100


class StepRoom:
    """Cuts the steps of one engine to the room that its device has; limits those that its scheduler plans."""

    def __init__(self, scheduler: Scheduler, backend: Backend) -> None:
        self._scheduler, self._backend = scheduler, backend
        self._configured = scheduler.max_step_tokens
        self._good_steps = 0
        # Attempts that had no room.
        self.out_of_memory = 0

    def halve(self, plan: StepPlan, written: int) -> list[StepPlan]:
        """What is tried instead of a plan that had no room; empty for one of a single token. written: see StepPlan."""
        self._backend.free_memory()
        self.out_of_memory += 1
        self._good_steps = -1  # the step under way is none
        if plan.num_tokens == 1:
            log.error("out of memory in a step of one token: its request fails")
            return []
        limit = max(-(-plan.num_tokens // 2), LEAST_TOKENS)
        self._scheduler.max_step_tokens = min(self._scheduler.max_step_tokens, limit)
        log.warning(
            "out of memory in a step of %d tokens, which is tried again in two; steps have at most %d for a while: "
            "engine.max_step_tokens or engine.kv_memory_mib may be lower",
            *(plan.num_tokens, self._scheduler.max_step_tokens),
        )
        return plan.halves(written)

    def step_done(self) -> None:
        """Whether or not in parts."""
        self._good_steps += 1
        if self._good_steps == GOOD_STEPS:
            self._good_steps = 0
            self._scheduler.max_step_tokens = min(self._configured, 2 * self._scheduler.max_step_tokens)
