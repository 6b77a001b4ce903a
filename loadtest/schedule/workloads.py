"""What requests ask: token ids in, a number of tokens out. Pure: a seed in, requests out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loadtest.schedule.traces import BLOCK_TOKENS, TraceRow

TokenIds = NDArray[np.uint32]


@dataclass(frozen=True)
class LoadRequest:
    prompt_ids: TokenIds
    # Tokens to generate.
    output_tokens: int

    @property
    def total_tokens(self) -> int:
        return len(self.prompt_ids) + self.output_tokens


@dataclass(frozen=True)
class Lengths:
    """Each length is drawn evenly from mean × (1 ± range_ratio), limits included; 0 makes it fixed."""

    input_tokens: int
    output_tokens: int
    range_ratio: float = 0.0
    # Tokens before the input that all requests share.
    prefix_tokens: int = 0


@dataclass(frozen=True)
class Vocabulary:
    """Draws token ids; the same name gives the same ids, whatever was drawn before."""

    size: int
    seed: int

    def draw(self, count: int, *name: int) -> TokenIds:
        rng = np.random.default_rng((self.seed, *name))
        return rng.integers(0, self.size, count, dtype=np.uint32)


# First parts of the names under which tokens are drawn.
_PREFIX, _BODY, _BLOCK, _WARM_UP = range(4)


def random_requests(count: int, lengths: Lengths, vocabulary: Vocabulary) -> list[LoadRequest]:
    rng = np.random.default_rng(vocabulary.seed)
    inputs = _spread(lengths.input_tokens, lengths.range_ratio, count, rng)
    outputs = _spread(lengths.output_tokens, lengths.range_ratio, count, rng)
    prefix = vocabulary.draw(lengths.prefix_tokens, _PREFIX)
    return [
        LoadRequest(np.concatenate([prefix, vocabulary.draw(int(length), _BODY, index)]), int(output))
        for index, (length, output) in enumerate(zip(inputs, outputs, strict=True))
    ]


def _spread(mean: int, ratio: float, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    low, high = max(1, math.floor(mean * (1 - ratio))), math.ceil(mean * (1 + ratio))
    return rng.integers(low, high, count, endpoint=True)


def trace_requests(rows: Sequence[TraceRow], scale: float, vocabulary: Vocabulary) -> list[LoadRequest]:
    """Prompts of the rows' lengths times `scale`; rows that share blocks share those tokens.

    A block keeps a whole number of tokens, max(1, 512 × scale rounded), and a prompt is scaled block by block: who
    shared a prefix of so many blocks shares it still, and nobody shares more.
    """
    block_tokens = max(1, round(BLOCK_TOKENS * scale))
    cache: dict[int, TokenIds] = {}

    def block(hash_id: int) -> TokenIds:
        if hash_id not in cache:
            cache[hash_id] = vocabulary.draw(block_tokens, _BLOCK, hash_id)
        return cache[hash_id]

    def prompt(index: int, row: TraceRow) -> TokenIds:
        if not row.hash_ids:
            return vocabulary.draw(max(1, round(row.input_tokens * scale)), _BODY, index)
        whole, rest = divmod(row.input_tokens, BLOCK_TOKENS)
        length = max(1, whole * block_tokens + round(rest * block_tokens / BLOCK_TOKENS))
        return np.concatenate([block(each) for each in row.hash_ids])[:length]

    return [LoadRequest(prompt(index, row), max(1, round(row.output_tokens * scale))) for index, row in enumerate(rows)]


def warm_up_requests(like: Sequence[LoadRequest], count: int, vocabulary: Vocabulary) -> list[LoadRequest]:
    """As long as the first ones, but of other tokens: what is measured finds no prefix that the warm-up left."""
    chosen = [like[index % len(like)] for index in range(count)]
    return [
        LoadRequest(vocabulary.draw(len(each.prompt_ids), _WARM_UP, index), each.output_tokens)
        for index, each in enumerate(chosen)
    ]
