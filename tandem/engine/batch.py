"""How the tokens of one engine step, flattened into one row, lie in sequences and in the paged KV pool.

Shape letters used in the engine: T tokens of the step, B sequences of the step, M most blocks of any sequence,
N blocks of the pool, P tokens a block (block_size), H query heads, K key/value heads, D head_dim.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

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

    def rows_alone(self, rows: list[int]) -> PagedBatch:
        """The same pages as these rows see them, each row a sequence of its own."""
        owners = [bisect_right(self.query_starts, row) - 1 for row in rows]
        after = [self.query_starts[owner + 1] - 1 - row for owner, row in zip(owners, rows, strict=True)]
        context_lens = [self.context_lens[owner] - left for owner, left in zip(owners, after, strict=True)]
        starts, device = list(range(len(rows) + 1)), self.slots_T.device
        return PagedBatch(
            num_decodes=len(rows),
            query_starts=starts,
            context_lens=context_lens,
            block_table_BxM=self.block_table_BxM[owners],
            context_lens_B=torch.tensor(context_lens, dtype=torch.int32, device=device),
            slots_T=self.slots_T[rows],
            query_starts_B1=torch.tensor(starts, dtype=torch.int32, device=device),
        )


@dataclass(frozen=True)
class AttentionOptions:
    """What one layer's attention asks for; constant for a layer."""

    scale: float
    # A query at position p sees keys at positions > p - window; 0 means all.
    window: int = 0
    # scores = softcap * tanh(scores / softcap) before the softmax; 0 means none.
    softcap: float = 0.0
