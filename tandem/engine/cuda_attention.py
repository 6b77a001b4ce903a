"""Attention over the paged KV pool on CUDA: flash attention reads the pages in place."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from tandem.engine.batch import AttentionOptions, PagedBatch
from tandem.engine.cpu_attention import paged_attention_cpu

# The kernel takes pages of a multiple of this many tokens.
PAGE_MULTIPLE = 256


def paged_attention_cuda(
    query_TxHxD: Tensor,
    key_TxKxD: Tensor,
    value_TxKxD: Tensor,
    k_pool_NxPxKxD: Tensor,
    v_pool_NxPxKxD: Tensor,
    batch: PagedBatch,
    options: AttentionOptions,
) -> Tensor:
    """All rows of a step in one kernel launch; [T, H, D]. What the kernel cannot do goes by gathered pages and SDPA."""
    if not _kernel_takes(query_TxHxD, k_pool_NxPxKxD, options):
        return paged_attention_cpu(query_TxHxD, key_TxKxD, value_TxKxD, k_pool_NxPxKxD, v_pool_NxPxKxD, batch, options)
    starts = batch.query_starts
    out = varlen_attn(
        query_TxHxD.contiguous(),
        k_pool_NxPxKxD,
        v_pool_NxPxKxD,
        batch.query_starts_B1,
        None,
        max(end - start for start, end in pairwise(starts)),
        max(batch.context_lens),
        scale=options.scale,
        window_size=(options.window - 1 if options.window else -1, 0),
        enable_gqa=query_TxHxD.shape[1] != k_pool_NxPxKxD.shape[2],
        seqused_k=batch.context_lens_B,
        block_table=batch.block_table_BxM,
        # One split: the order of summation, and so the result, does not depend on the batch.
        num_splits=1,
    )
    assert isinstance(out, Tensor)
    return out


def _kernel_takes(query: Tensor, k_pool: Tensor, options: AttentionOptions) -> bool:
    half = query.dtype in (torch.float16, torch.bfloat16)
    return half and k_pool.shape[1] % PAGE_MULTIPLE == 0 and not options.softcap
