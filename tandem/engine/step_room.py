"""What becomes of a step for which the device has no room: it is done in parts, and steps are smaller for a while."""

from __future__ import annotations

import logging
from collections.abc import Callable

from tandem.engine.backends.cuda.device import free_memory
from tandem.engine.scheduler import Scheduler, StepPlan

log = logging.getLogger(__name__)

# Smaller steps take so little that what was in their way was something else, and passes.
LEAST_TOKENS = 64
# After so many steps with room in a row, steps may be twice as large again: want of memory may pass, and where it
# does not, one step in so many is done twice.
GOOD_STEPS = 100


class StepRoom:
    """Does the steps of one engine; limits those that its scheduler plans."""

    def __init__(
        self,
        scheduler: Scheduler,
        device: str,
        attempt: Callable[[StepPlan, int], int | None],
        give_up: Callable[[StepPlan], None],
    ) -> None:
        """attempt: does a plan of which so many layers' KV was told before; None if there was room, else how many are
        told now. give_up: ends a plan of one token for which there is none.
        """
        self._scheduler, self._device = scheduler, device
        self._attempt, self._give_up = attempt, give_up
        self._configured = scheduler.max_step_tokens
        self._good_steps = 0
        # Attempts that had no room.
        self.out_of_memory = 0

    def process(self, plan: StepPlan) -> None:
        before = self.out_of_memory
        self._process(plan, 0)
        self._good_steps = self._good_steps + 1 if self.out_of_memory == before else 0
        if self._good_steps == GOOD_STEPS:
            self._good_steps = 0
            self._scheduler.max_step_tokens = min(self._configured, 2 * self._scheduler.max_step_tokens)

    def _process(self, plan: StepPlan, told: int) -> None:
        now_told = self._attempt(plan, told)
        if now_told is None:
            return
        free_memory(self._device)
        self.out_of_memory += 1
        if plan.num_tokens == 1:
            log.error("out of memory in a step of one token: its request fails")
            self._give_up(plan)
            return
        self._shrink(plan.num_tokens)
        for half in plan.halves():
            if rest := half.without_finished():
                self._process(rest, now_told)

    def _shrink(self, tokens: int) -> None:
        limit = max(-(-tokens // 2), LEAST_TOKENS)
        self._scheduler.max_step_tokens = min(self._scheduler.max_step_tokens, limit)
        log.warning(
            "out of memory in a step of %d tokens, which is tried again in two; steps have at most %d for a while: "
            "engine.max_step_tokens or engine.kv_memory_mib may be lower",
            *(tokens, self._scheduler.max_step_tokens),
        )
