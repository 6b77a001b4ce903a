"""The default: a cached prefix counts as work that is done already."""

from __future__ import annotations

from collections.abc import Sequence

from router.policy.base import Demand, Placement, WorkerView


class CacheAware:
    """Prefill where the first token comes soonest, decode where most blocks stay free, both on one worker if it can."""

    def choose_pair(self, prefills: Sequence[WorkerView], decodes: Sequence[WorkerView], demand: Demand) -> Placement:
        prefill = self.choose_prefill(prefills, demand.prompt_tokens)
        if any(worker.worker_id == prefill for worker in decodes):
            return Placement(prefill, prefill)
        return Placement(prefill, min(decodes, key=_decode_cost).worker_id)

    def choose_prefill(self, prefills: Sequence[WorkerView], prompt_tokens: int) -> str:
        return min(prefills, key=lambda worker: _prefill_cost(worker, prompt_tokens)).worker_id


def _prefill_cost(worker: WorkerView, prompt_tokens: int) -> tuple[int, int, int, str]:
    """Tokens to compute until the first token: a cached prefix is worth exactly the queue that it makes up for, so
    prompts that share one meet on a worker until it is busier than that. Among equals, the emptier cache."""
    tokens = worker.queued_prompt_tokens + worker.to_compute(prompt_tokens)
    return tokens, worker.live_requests, worker.cache_size, worker.worker_id


def _decode_cost(worker: WorkerView) -> tuple[int, int, str]:
    """Blocks still free afterwards, as if shared ones cost none: what is there already need not travel either."""
    return -(worker.free_blocks + worker.cached_blocks), worker.live_requests, worker.worker_id
