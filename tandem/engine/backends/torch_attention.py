"""Attention over the paged KV pool by torch alone, sequence by sequence: any device, any dtype, any options.

Shape letters as in `tandem.engine.batch`; for one sequence, C is its context length and Q its rows in this step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tandem.engine.batch import AttentionOptions, PagedBatch

# Rows of a chunk computed at once where a mask or a score matrix is needed: bounds both at TILE * context.
TILE = 256


def write_kv(
    key_TxKxD: Tensor, value_TxKxD: Tensor, k_pool_NxPxKxD: Tensor, v_pool_NxPxKxD: Tensor, batch: PagedBatch
) -> None:
    """Put the step's keys and values into their slots of the pool (in place; the pools are contiguous)."""
    for new_TxKxD, pool in ((key_TxKxD, k_pool_NxPxKxD), (value_TxKxD, v_pool_NxPxKxD)):
        pool.view(-1, *pool.shape[2:]).index_copy_(0, batch.slots_T, new_TxKxD.to(pool.dtype))


def reference_attention(
    query_QxHxD: Tensor,
    key_CxKxD: Tensor,
    value_CxKxD: Tensor,
    first_position: int,
    options: AttentionOptions,
    first_key: int = 0,
) -> Tensor:
    """Attention of one sequence by the textbook, in float32: the row at `first_position + i` sees keys up to itself.

    The keys are those from position `first_key` on.

    Returns [Q, H, D] in the query's dtype. Memory: a few times Q * C * H floats.
    """
    group = query_QxHxD.shape[1] // key_CxKxD.shape[1]
    key_CxHxD = key_CxKxD.float().repeat_interleave(group, dim=1)
    value_CxHxD = value_CxKxD.float().repeat_interleave(group, dim=1)
    scores_HxQxC = torch.einsum("qhd,chd->hqc", query_QxHxD.float(), key_CxHxD) * options.scale
    if options.softcap:
        scores_HxQxC = options.softcap * torch.tanh(scores_HxQxC / options.softcap)
    visible_QxC = _visible(query_QxHxD, key_CxKxD, first_position, options, first_key)
    weights_HxQxC = scores_HxQxC.masked_fill(~visible_QxC, float("-inf")).softmax(dim=-1)
    return torch.einsum("hqc,chd->qhd", weights_HxQxC, value_CxHxD).to(query_QxHxD.dtype)


class TorchAttention:
    """One step's attention, for layers that ask for the same."""

    def __init__(self, batch: PagedBatch, options: AttentionOptions) -> None:
        self.batch, self.options = batch, options

    def __call__(self, query_TxHxD: Tensor, key: Tensor, value: Tensor, k_pool: Tensor, v_pool: Tensor) -> Tensor:
        """See Attention. Contiguous, in the query's dtype. A chunk that starts its sequence is computed from the step's
        own keys and values alone."""
        batch = self.batch
        out_TxHxD = torch.empty(query_TxHxD.shape, dtype=query_TxHxD.dtype, device=query_TxHxD.device)
        if batch.num_decodes:
            self.decode(query_TxHxD, k_pool, v_pool, out_TxHxD)
        for sequence in range(batch.num_decodes, len(batch.context_lens)):
            rows = slice(batch.query_starts[sequence], batch.query_starts[sequence + 1])
            query, out = query_TxHxD[rows], out_TxHxD[rows]
            if batch.context_lens[sequence] == len(query):
                _chunk(query, key[rows], value[rows], self.options, out)
            else:
                keys, values = (_gather(pool, batch, sequence) for pool in (k_pool, v_pool))
                _chunk(query, keys, values, self.options, out)
        return out_TxHxD

    def decode(self, query_TxHxD: Tensor, k_pool: Tensor, v_pool: Tensor, out_TxHxD: Tensor) -> None:
        """The step's decode rows, written to the first rows of `out`."""
        for row in range(self.batch.num_decodes):
            keys, values = (_gather(pool, self.batch, row) for pool in (k_pool, v_pool))
            position = self.batch.context_lens[row] - 1
            out_TxHxD[row] = reference_attention(query_TxHxD[row : row + 1], keys, values, position, self.options)[0]


def _gather(pool_NxPxKxD: Tensor, batch: PagedBatch, sequence: int) -> Tensor:
    """A sequence's pages in order, as one [C, K, D] tensor."""
    context_len, page = batch.context_lens[sequence], pool_NxPxKxD.shape[1]
    blocks = batch.block_table_BxM[sequence, : -(-context_len // page)]
    return pool_NxPxKxD.index_select(0, blocks).flatten(0, 1)[:context_len]


def _visible(
    query_QxHxD: Tensor, key_CxKxD: Tensor, first_position: int, options: AttentionOptions, first_key: int
) -> Tensor:
    """bool [Q, C]: which keys, from position `first_key` on, the rows from `first_position` on see."""
    rows, keys, device = query_QxHxD.shape[0], key_CxKxD.shape[0], query_QxHxD.device
    position_Qx1 = torch.arange(first_position, first_position + rows, device=device).unsqueeze(1)
    key_position_C = torch.arange(first_key, first_key + keys, device=device)
    visible_QxC = key_position_C <= position_Qx1
    if options.window:
        visible_QxC &= key_position_C > position_Qx1 - options.window
    if options.chunk:
        visible_QxC &= key_position_C >= position_Qx1 // options.chunk * options.chunk
    return visible_QxC


def _chunk(
    query_QxHxD: Tensor, key_CxKxD: Tensor, value_CxKxD: Tensor, options: AttentionOptions, out_QxHxD: Tensor
) -> None:
    """The last Q rows of a sequence against all of its C keys, written to `out_QxHxD`."""
    rows, keys = query_QxHxD.shape[0], key_CxKxD.shape[0]
    if rows == keys and not options.softcap and options.first_key(keys - 1) == 0:
        out_QxHxD.copy_(_sdpa(query_QxHxD, key_CxKxD, value_CxKxD, options, None))
        return
    for start in range(0, rows, TILE):
        stop = min(start + TILE, rows)
        first_position = keys - rows + start
        first_key, last_key = options.first_key(first_position), keys - rows + stop
        key, value = key_CxKxD[first_key:last_key], value_CxKxD[first_key:last_key]
        out_QxHxD[start:stop] = _tile(query_QxHxD[start:stop], key, value, first_position, options, first_key)


def _tile(
    query_QxHxD: Tensor,
    key_CxKxD: Tensor,
    value_CxKxD: Tensor,
    first_position: int,
    options: AttentionOptions,
    first_key: int,
) -> Tensor:
    if options.softcap:  # SDPA has no place for it
        return reference_attention(query_QxHxD, key_CxKxD, value_CxKxD, first_position, options, first_key)
    visible_QxC = _visible(query_QxHxD, key_CxKxD, first_position, options, first_key)
    return _sdpa(query_QxHxD, key_CxKxD, value_CxKxD, options, visible_QxC)


def _sdpa(
    query_QxHxD: Tensor, key_CxKxD: Tensor, value_CxKxD: Tensor, options: AttentionOptions, mask_QxC: Tensor | None
) -> Tensor:
    out_1xHxQxD = F.scaled_dot_product_attention(
        query_QxHxD.transpose(0, 1).unsqueeze(0),
        key_CxKxD.transpose(0, 1).unsqueeze(0),
        value_CxKxD.transpose(0, 1).unsqueeze(0),
        attn_mask=mask_QxC,
        is_causal=mask_QxC is None,
        scale=options.scale,
        enable_gqa=query_QxHxD.shape[1] != key_CxKxD.shape[1],
    )
    return out_1xHxQxD[0].transpose(0, 1)
