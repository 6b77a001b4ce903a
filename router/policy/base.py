"""What a routing policy is, and what it sees. Pure values: no clock, no network, no state of the router."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from tandem.types import Role


@dataclass(frozen=True)
class WorkerView:
    """One routable worker at one moment: its last heartbeat, and what this router has placed on it since."""

    worker_id: str
    roles: frozenset[Role]
    draining: bool
    # Tokens in a block of its KV pool.
    block_size: int
    total_blocks: int
    # Less what was placed since the heartbeat; below 0 when more is promised than there is. Cached blocks that nobody
    # holds are free ones.
    free_blocks: int
    # Prompt tokens not yet computed, in its queue and on their way to it.
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
    # Tokens that the answer may have, not those that it will have.
    max_tokens: int

    @property
    def kv_tokens(self) -> int:
        """Tokens of the whole request that get KV: the last one generated is never read again."""
        return self.prompt_tokens + self.max_tokens - 1


@dataclass(frozen=True)
class Placement:
    """The ids of two workers; the same one twice when it plays both roles, and then the KV does not travel."""

    prefill: str
    decode: str


@runtime_checkable
class Policy(Protocol):
    """Which workers serve a request: pure methods over a snapshot.

    `prefills` and `decodes` are the workers that may be chosen for the role, in no particular order and never empty:
    they play it, do not drain, and their whole pool could hold the request. A worker that plays both roles is in both.

    A policy is asked more than once for a request: when its deadline is checked, when it is placed, when it is placed
    again. So the same snapshot must give the same answer, and ties are broken by worker_id. It is asked in the
    router's event loop, on which everybody waits meanwhile: microseconds, not milliseconds.

    An answer that is none of the workers offered, and an exception, fail the request at hand with InternalError.
    """

    def choose_pair(self, prefills: Sequence[WorkerView], decodes: Sequence[WorkerView], demand: Demand) -> Placement:
        """The workers of one choice of a request. Reserving blocks at the decode worker comes first, then prefill."""

    def choose_prefill(self, prefills: Sequence[WorkerView], prompt_tokens: int) -> str:
        """The id of the worker that computes a prompt where nobody decodes (an embedding), or whose decode worker is
        fixed already: the prefill worker went away while the request waited for blocks.
        """


def blocks_for(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)
