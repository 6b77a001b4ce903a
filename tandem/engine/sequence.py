"""One request inside the engine: its tokens, its blocks, how far it has come."""

from __future__ import annotations

import time
from collections import abc
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from tandem.engine.block_pool import BlockTable
from tandem.errors import TandemError
from tandem.prefix import chain_hashes
from tandem.types import EmbedParams, EngineRequest, FinishReason, Pooling, Token


@dataclass(frozen=True)
class Started:
    """The first chunk is about to be computed."""

    queued_ms: float
    # Prompt tokens whose KV was found in the prefix cache.
    cached_tokens: int
    # When, on time.monotonic(): whoever is told may hear of it while the engine computes, or later.
    at_s: float


@dataclass(frozen=True)
class KVWritten:
    """The KV of prompt tokens [start, end) is final in the pool, in these layers; on a GPU, in the stream's order."""

    layers: range
    start: int
    end: int


@dataclass(frozen=True)
class NewToken:
    position: int
    token: Token
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class Embedded:
    """The end of a prompt that was to be embedded. The vector: float32, little-endian."""

    vector: bytes


@dataclass(frozen=True)
class Failed:
    """The engine could not go on with this request; its blocks are free."""

    error: TandemError


EngineEvent = Started | KVWritten | NewToken | Embedded | Failed
Listener = Callable[[EngineEvent], None]
Names = abc.Sequence[bytes]
# An event and whose it is.
Emission = tuple["Sequence", EngineEvent]


class SequenceState(StrEnum):
    """Where a sequence stands in its engine; the scheduler alone changes it.

        NEW ──add──▶ WAITING ──has its blocks──▶ PREFILLING ──decode_here──▶ RUNNING ──last token──▶ ENDED
         │                                           └──── handed to the sender, or embedded ────────▶ ENDED
         └──attach (KV came from elsewhere)────────────────────────────────▶ RUNNING

    An abort or a failure leads from each of them to ENDED.
    """

    NEW = "new"
    WAITING = "waiting"
    PREFILLING = "prefilling"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(eq=False)
class Sequence:
    """One request in one engine.

    With `decode_here` it goes on decoding after its first token, in blocks that were reserved for prompt and output
    (colocated). Without, the prompt is all that is computed here, and its blocks stay held for the handoff until the
    holder of the sequence releases the table.
    """

    request: EngineRequest
    listener: Listener
    decode_here: bool
    # None until the scheduler admits it; given from the start when blocks were reserved.
    table: BlockTable | None = None
    # The prompt is to be embedded: its end is a vector, not a token.
    embed: EmbedParams | None = None
    state: SequenceState = SequenceState.NEW
    # Tokens whose KV is in the pool.
    num_computed: int = 0
    output_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    arrived_s: float = field(default_factory=time.monotonic)
    # Names of the prompt's full blocks; None until the engine takes the sequence, if nobody has named them before.
    prompt_names: Names | None = None
    # Names of the full blocks whose tokens are computed, prompt's and output's.
    hashes: list[bytes] = field(default_factory=list)

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def averages(self) -> bool:
        """Whether the hidden state of every prompt token is needed."""
        return self.embed is not None and self.embed.pooling is Pooling.MEAN

    @property
    def reusable_tokens(self) -> int:
        """Leading prompt tokens whose KV may come from the prefix cache: it holds no hidden states, and those of the
        last token are needed in any case."""
        return 0 if self.averages else self.prompt_len - 1

    @property
    def tokens_left_to_prefill(self) -> int:
        return max(0, self.prompt_len - self.num_computed)

    def token_ids(self, start: int, end: int) -> list[int]:
        """Prompt and output tokens of positions [start, end)."""
        prompt = self.request.prompt_ids
        if end <= len(prompt):
            return list(prompt[start:end])
        return [*prompt[start:], *self.output_ids[max(0, start - len(prompt)) : end - len(prompt)]]

    def positions(self, start: int, end: int) -> abc.Sequence[int]:
        """What the model is told of where these tokens are."""
        return range(start, end)

    def name_prompt(self, block_size: int) -> None:
        """Unless somebody did before, outside of the engine's thread: it takes 0.1 µs a token."""
        if self.prompt_names is None:
            self.prompt_names = prompt_hashes(self.request, block_size)

    def extend_hashes(self, block_size: int) -> None:
        """Names every full block whose tokens are computed; the prompt's have their names already."""
        full = self.num_computed // block_size
        self.hashes += (self.prompt_names or ())[len(self.hashes) : full]
        done = len(self.hashes)
        if full > done:
            parent = self.hashes[-1] if self.hashes else None
            tokens = self.token_ids(done * block_size, self.num_computed)
            self.hashes += chain_hashes(parent, tokens, block_size, self.request.cache_salt)


def prompt_hashes(request: EngineRequest, block_size: int) -> list[bytes]:
    """The names of the prompt's full blocks."""
    return chain_hashes(None, request.prompt_ids, block_size, request.cache_salt)
