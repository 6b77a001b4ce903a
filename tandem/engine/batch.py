"""How the tokens of one engine step, flattened into one row, lie in sequences and in the paged KV pool.

Shape letters used in the engine: T tokens of the step, B sequences of the step, M most blocks of any sequence,
N blocks of the pool, P tokens a block (block_size), H query heads, K key/value heads, D head_dim.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class PagedBatch:
    """The paged-KV metadata of one step; the same for every layer.

    Sequences are ordered decodes first: sequence i < num_decodes owns exactly row i of the flattened tokens;
    the sequences after them own chunks of one or more rows, one after another.
    """

    num_decodes: int
    # Row range of sequence i is query_starts[i]:query_starts[i + 1]; length B + 1.
    query_starts: list[int]
    # Tokens of sequence i that are in the KV pool once this step's have been written; length B.
    context_lens: list[int]
    # int32 [B, M] on the device: block ids of each sequence in order; rows are padded with 0.
    block_table_BxM: Tensor
    # int32 [B] on the device: the same as context_lens.
    context_lens_B: Tensor
    # int64 [T] on the device: where each token's K and V go: block * block_size + offset.
    slots_T: Tensor
    # int32 [B + 1] on the device: the same as query_starts.
    query_starts_B1: Tensor

    @cached_property
    def most_rows(self) -> int:
        """Rows of the sequence that has most."""
        return max(end - start for start, end in pairwise(self.query_starts))

    @cached_property
    def longest_context(self) -> int:
        return max(self.context_lens)

    @cached_property
    def key_starts_B1(self) -> Tensor:
        """int32 [B + 1] on the device: where each sequence's keys begin when all lie one after another."""
        return torch.nn.functional.pad(self.context_lens_B.cumsum(0, dtype=torch.int32), (1, 0))

    def context_slots_C(self, block_size: int) -> Tensor:
        """int64 [C] on the device: the slots of every sequence's context, one sequence after another."""
        if block_size not in self._context_slots:
            self._context_slots[block_size] = self._find_context_slots(block_size)
        return self._context_slots[block_size]

    @cached_property
    def _context_slots(self) -> dict[int, Tensor]:
        return {}

    def _find_context_slots(self, block_size: int) -> Tensor:
        # The device works from what it has, and is told how long the result is: nothing waits for it.
        total, device = sum(self.context_lens), self.slots_T.device
        sequences = torch.arange(len(self.context_lens), device=device)
        owner_C = torch.repeat_interleave(sequences, self.context_lens_B, output_size=total)
        position_C = torch.arange(total, device=device) - self.key_starts_B1[owner_C]
        block_C = self.block_table_BxM[owner_C, position_C // block_size].long()
        return block_C * block_size + position_C % block_size

    def rows_alone(self, rows: list[int], send: Callable[..., list[Tensor]]) -> tuple[Tensor, PagedBatch]:
        """The same pages as these rows see them, each row a sequence of its own; the rows go before, int64 on the
        device. send: see Backend."""
        owners = [bisect_right(self.query_starts, row) - 1 for row in rows]
        after = [self.query_starts[owner + 1] - 1 - row for owner, row in zip(owners, rows, strict=True)]
        context_lens = [self.context_lens[owner] - left for owner, left in zip(owners, after, strict=True)]
        starts = list(range(len(rows) + 1))
        rows_R, owners_R, context_lens_R, starts_R1 = send(
            np.array(rows, np.int64),
            np.array(owners, np.int64),
            np.array(context_lens, np.int32),
            np.array(starts, np.int32),
        )
        batch = PagedBatch(
            num_decodes=len(rows),
            query_starts=starts,
            context_lens=context_lens,
            block_table_BxM=self.block_table_BxM[owners_R],
            context_lens_B=context_lens_R,
            slots_T=self.slots_T[rows_R],
            query_starts_B1=starts_R1,
        )
        return rows_R, batch


@dataclass(frozen=True)
class AttentionOptions:
    """What one layer's attention asks for; constant for a layer."""

    scale: float
    # A query at position p sees keys at positions > p - window; 0 means all.
    window: int = 0
    # A query at position p sees keys at positions >= p // chunk * chunk; 0 means all. Both may be set.
    chunk: int = 0
    # scores = softcap * tanh(scores / softcap) before the softmax; 0 means none.
    softcap: float = 0.0

    def first_key(self, position: int) -> int:
        """Position of the oldest key that a query at `position` sees."""
        within_window = max(position + 1 - self.window, 0) if self.window else 0
        within_chunk = position // self.chunk * self.chunk if self.chunk else 0
        return max(within_window, within_chunk)
