"""Which workers serve a choice: a pure function from a snapshot. Filter, score, pick."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from tandem.errors import RETRY_AFTER_MS, InvalidRequest, Unavailable
from tandem.types import Role

# Why nobody plays a role now, where more is known than that nobody has joined: how a sentence goes on that begins with
# "no decode worker". Clients read it, so it names nobody.
Absent = Mapping[Role, str]
NEVER_CAME = "has joined"
_UNKNOWN: Absent = MappingProxyType({})


@dataclass(frozen=True)
class WorkerView:
    """One routable worker at one moment: its last heartbeat and what this router placed since."""

    worker_id: str
    roles: frozenset[Role]
    draining: bool
    block_size: int
    total_blocks: int
    # Less what was placed since the heartbeat; below 0 when more is promised than there is.
    free_blocks: int
    # Prompt tokens not yet computed.
    queued_prompt_tokens: int
    # Decoding, reserved or waiting for blocks.
    live_requests: int
    # Leading blocks of the prompt at hand that are in its prefix cache, and all that are.
    cached_blocks: int = 0
    cache_size: int = 0

    def to_compute(self, prompt_tokens: int) -> int:
        """Prompt tokens that its prefix cache does not save. The last one is always computed, for its logits."""
        reusable = (prompt_tokens - 1) // self.block_size
        return prompt_tokens - min(self.cached_blocks, reusable) * self.block_size


@dataclass(frozen=True)
class Demand:
    """What a choice needs: KV of its prompt while it prefills, of prompt and output while it decodes."""

    prompt_tokens: int
    max_tokens: int

    @property
    def kv_tokens(self) -> int:
        """Of the whole request: the last token generated is never read again, so it gets no KV."""
        return self.prompt_tokens + self.max_tokens - 1


@dataclass(frozen=True)
class Placement:
    """The ids of two workers; the same one twice when it plays both roles, and then the KV does not travel."""

    prefill: str
    decode: str


def choose(workers: Sequence[WorkerView], demand: Demand, absent: Absent = _UNKNOWN) -> Placement:
    """Raises Unavailable when a role has no worker now, InvalidRequest when no joined worker could ever hold it."""
    prefill = choose_prefill(workers, demand.prompt_tokens, absent)
    decodes = _filter(workers, Role.DECODE, demand.kv_tokens, absent)
    decode = prefill if prefill in decodes else min(decodes, key=_decode_cost)
    return Placement(prefill.worker_id, decode.worker_id)


def choose_prefill(workers: Sequence[WorkerView], prompt_tokens: int, absent: Absent = _UNKNOWN) -> WorkerView:
    """Where a prompt is computed, whoever decodes, if anybody does. Raises as `choose` does."""
    prefills = _filter(workers, Role.PREFILL, prompt_tokens, absent)
    return min(prefills, key=lambda worker: _prefill_cost(worker, prompt_tokens))


def blocks_for(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)


def _prefill_cost(worker: WorkerView, prompt_tokens: int) -> tuple[int, int, int, str]:
    """Tokens to compute until the first token: a cached prefix is worth exactly the queue that it makes up for, so
    prompts that share one meet on a worker until it is busier than that. Among equals, the emptier cache."""
    tokens = worker.queued_prompt_tokens + worker.to_compute(prompt_tokens)
    return tokens, worker.live_requests, worker.cache_size, worker.worker_id


def _decode_cost(worker: WorkerView) -> tuple[int, int, str]:
    """Blocks still free afterwards, as if shared ones cost none: what is there already need not travel either."""
    return -(worker.free_blocks + worker.cached_blocks), worker.live_requests, worker.worker_id


def _filter(workers: Sequence[WorkerView], role: Role, tokens: int, absent: Absent) -> list[WorkerView]:
    playing = [worker for worker in workers if role in worker.roles]
    if not playing:
        raise Unavailable(f"no {role} worker {absent.get(role, NEVER_CAME)}", retry_after_ms=RETRY_AFTER_MS)
    large = [worker for worker in playing if blocks_for(tokens, worker.block_size) <= worker.total_blocks]
    if not large:
        limit = max(worker.total_blocks * worker.block_size for worker in playing)
        raise InvalidRequest(
            f"the request needs room for {tokens} tokens; the largest {role} worker holds {limit}",
            field="prompt" if role is Role.PREFILL else "max_tokens",
        )
    ready = [worker for worker in large if not worker.draining]
    if not ready:
        words = f"every {role} worker that could hold the request is draining"
        raise Unavailable(words, retry_after_ms=RETRY_AFTER_MS)
    return ready
