"""Kernels over the paged KV pool (fp32): writing the step's keys and values, and decode attention.

Importing this module compiles the kernels, or loads them from numba's cache: import it late (see
`backends/cpu/attention.py`).
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tandem.engine.backends.cpu.kernels.launch import Kernel, addresses, operands, slots
from tandem.engine.backends.cpu.kernels.parts import (
    copy,
    count_up,
    exp_nonpositive,
    fast_jit,
    first_key,
    floats,
    int32s,
    int64s,
    jit,
    next_rows,
    next_ticket,
    own_scratch,
    python_jit,
)
from tandem.engine.batch import AttentionOptions, PagedBatch

# Keys one work item covers. A constant, so that a row's arithmetic depends on its own context alone, never on the
# batch or the thread count. Small enough to give two cores work at a context of 128, large enough that the partial
# results (one row per item) stay below a few percent of the K and V read.
SPLIT = 64


@operands
class DecodeOperands:
    # [B, H, D], [N, P, K, D] twice, [B, H, D]; int32 [B, M] and [B].
    query, k_pool, v_pool, out, table, contexts = slots(6)
    rows, heads, kv_heads, dim, page, most_blocks, window, chunk = slots(8)
    scale, softcap = slots(2, ctypes.c_float)
    # Partial results, for each work item: stats [H, 2], then sums [H, D]. int64 [B]: a row's items that are done.
    parts, done = slots(2)
    # A thread's scores, [H, SPLIT].
    scratch, scratch_bytes = slots(2)


@operands
class StoreOperands:
    key, key_stride, value, value_stride, k_pool, v_pool = slots(6)
    # slots_T: int64. Strides and size in floats.
    slots_T, rows, size = slots(3)


@fast_jit
def _score_run(q: int, k: int, tokens: int, heads: int, kv_heads: int, dim: int, scores: int) -> None:
    """scores[h, t] = q[h] . k[t, kv(h)] for consecutive tokens, in memory order; score rows are SPLIT apart."""
    group = heads // kv_heads
    for t in range(tokens):
        for kh in range(kv_heads):
            key = floats(k + 4 * dim * (t * kv_heads + kh), dim)
            for h in range(kh * group, kh * group + group):
                query = floats(q + 4 * dim * h, dim)
                total = np.float32(0.0)
                for d in range(dim):
                    total += query[d] * key[d]
                floats(scores + 4 * (h * SPLIT + t), 1)[0] = total


@fast_jit
def _sum_run(p: int, v: int, tokens: int, heads: int, kv_heads: int, dim: int, out: int) -> None:
    """out[h] += sum over t of p[h, t] * v[t, kv(h)]; four tokens a pass, so that `out` is read and written less."""
    group = heads // kv_heads
    row = 4 * dim * kv_heads
    for t in range(0, tokens - 3, 4):
        for kh in range(kv_heads):
            base = v + t * row + 4 * dim * kh
            v0 = floats(base, dim)
            v1 = floats(base + row, dim)
            v2 = floats(base + 2 * row, dim)
            v3 = floats(base + 3 * row, dim)
            for h in range(kh * group, kh * group + group):
                w = floats(p + 4 * (h * SPLIT + t), 4)
                w0, w1, w2, w3 = w[0], w[1], w[2], w[3]
                total = floats(out + 4 * dim * h, dim)
                for d in range(dim):
                    total[d] += w0 * v0[d] + w1 * v1[d] + w2 * v2[d] + w3 * v3[d]
    for t in range(tokens // 4 * 4, tokens):
        for kh in range(kv_heads):
            value = floats(v + t * row + 4 * dim * kh, dim)
            for h in range(kh * group, kh * group + group):
                w0 = floats(p + 4 * (h * SPLIT + t), 1)[0]
                total = floats(out + 4 * dim * h, dim)
                for d in range(dim):
                    total[d] += w0 * value[d]


@fast_jit
def _softmax_rows(scores: int, heads: int, tokens: int, scale: Any, softcap: Any, stats: int) -> None:
    """Turn scores into exp(score - max); stats[h] = (max, sum)."""
    for h in range(heads):
        row = floats(scores + 4 * h * SPLIT, SPLIT)
        for t in range(tokens):
            row[t] *= scale
        if softcap > np.float32(0.0):
            for t in range(tokens):
                row[t] = softcap * np.float32(np.tanh(row[t] / softcap))
        top = row[0]
        for t in range(1, tokens):
            top = max(top, row[t])
        total = np.float32(0.0)
        for t in range(tokens):
            e = exp_nonpositive(row[t] - top)
            row[t] = e
            total += e
        stat = floats(stats + 8 * h, 2)
        stat[0] = top
        stat[1] = total


@fast_jit
def _merge(parts: int, count: int, heads: int, dim: int, out: int) -> None:
    """out = the softmax-weighted sum of `count` partial results, always in the order of the context."""
    size = heads * (dim + 2)
    for h in range(heads):
        top = floats(parts + 4 * 2 * h, 1)[0]
        for s in range(1, count):
            top = max(top, floats(parts + 4 * (s * size + 2 * h), 1)[0])
        result = floats(out + 4 * dim * h, dim)
        for d in range(dim):
            result[d] = np.float32(0.0)
        total = np.float32(0.0)
        for s in range(count):
            stat = floats(parts + 4 * (s * size + 2 * h), 2)
            weight = exp_nonpositive(stat[0] - top)
            total += weight * stat[1]
            part = floats(parts + 4 * (s * size + 2 * heads + dim * h), dim)
            for d in range(dim):
                result[d] += weight * part[d]
        inverse = np.float32(1.0) / total
        for d in range(dim):
            result[d] *= inverse


@python_jit
def _num_splits(context: int, window: int, chunk: int) -> int:
    """Work items of a row."""
    return (context - 1) // SPLIT - first_key(context - 1, window, chunk) // SPLIT + 1


@jit
def _run(op: DecodeOperands, sequence: int, position: int, last: int) -> tuple[int, int]:
    """Keys from `position` on that lie in one page: their byte in a pool, and how many they are, up to `last`."""
    offset = position % op.page
    block = int32s(op.table + 4 * op.most_blocks * sequence, op.most_blocks)[position // op.page]
    return 4 * op.kv_heads * op.dim * (np.int64(block) * op.page + offset), min(op.page - offset, last - position)


@jit
def _attend_split(op: DecodeOperands, sequence: int, first: int, last: int, scores: int, part: int) -> None:
    """One work item: keys first <= position < last of one sequence; `part` gets stats and the unnormalised sum."""
    heads, kv_heads, dim = op.heads, op.kv_heads, op.dim
    query = op.query + 4 * heads * dim * sequence
    position = first
    while position < last:
        at, tokens = _run(op, sequence, position, last)
        _score_run(query, op.k_pool + at, tokens, heads, kv_heads, dim, scores + 4 * (position - first))
        position += tokens
    _softmax_rows(scores, heads, last - first, op.scale, op.softcap, part)
    out = part + 8 * heads
    floats(out, heads * dim)[:] = np.float32(0.0)
    position = first
    while position < last:
        at, tokens = _run(op, sequence, position, last)
        _sum_run(scores + 4 * (position - first), op.v_pool + at, tokens, heads, kv_heads, dim, out)
        position += tokens


@Kernel
def _decode(op: DecodeOperands) -> None:
    rows, heads, dim, window, chunk = op.rows, op.heads, op.dim, op.window, op.chunk
    contexts = int32s(op.contexts, rows)
    part_bytes = 4 * heads * (dim + 2)
    scores = own_scratch(op)
    sequence, before = 0, 0
    item = next_ticket(op)
    while True:
        # Tickets only grow, so the search for an item's sequence goes on from the last one.
        while sequence < rows and item >= before + _num_splits(contexts[sequence], window, chunk):
            before += _num_splits(contexts[sequence], window, chunk)
            sequence += 1
        if sequence == rows:
            return
        context: Any = np.int64(contexts[sequence])
        start = first_key(context - 1, window, chunk)
        split = start // SPLIT + item - before
        first, last = max(split * SPLIT, start), min(split * SPLIT + SPLIT, context)
        _attend_split(op, sequence, first, last, scores, op.parts + item * part_bytes)
        count = _num_splits(context, window, chunk)
        # Whoever ends a sequence's last item merges it; the order of the merge is that of the context.
        if count_up(op.done + 8 * sequence) == count - 1:
            _merge(op.parts + before * part_bytes, count, heads, dim, op.out + 4 * heads * dim * sequence)
        item = next_ticket(op)


@Kernel
def _store(op: StoreOperands) -> None:
    size, slots = op.size, int64s(op.slots_T, op.rows)
    first, last = next_rows(op, SPLIT)
    while first < last:
        for row in range(first, last):
            place = 4 * size * slots[row]
            copy(op.key + 4 * op.key_stride * row, op.k_pool + place, size)
            copy(op.value + 4 * op.value_stride * row, op.v_pool + place, size)
        first, last = next_rows(op, SPLIT)


def store_rows(key_TxKxD: Tensor, value_TxKxD: Tensor, k_pool: Tensor, v_pool: Tensor, slots_T: Tensor) -> None:
    """Copy each token's key and value to its slot of the pools; fp32, rows and pools dense."""
    op = StoreOperands()
    op.key, op.value, op.k_pool, op.v_pool, op.slots_T = addresses(key_TxKxD, value_TxKxD, k_pool, v_pool, slots_T)
    op.key_stride, op.value_stride = key_TxKxD.stride(0), value_TxKxD.stride(0)
    op.rows, op.size = key_TxKxD.shape[0], key_TxKxD[0].numel()
    _store.launch(op, threads=torch.get_num_threads() if op.rows > SPLIT else 1)


class DecodePlan:
    """Attention of a step's decode rows, cut into work items once, for all layers that ask for the same."""

    def __init__(self, batch: PagedBatch, options: AttentionOptions) -> None:
        contexts, table = batch.context_lens[: batch.num_decodes], batch.block_table_BxM
        self._items = sum(_num_splits(context, options.window, options.chunk) for context in contexts)
        self._done = torch.zeros(len(contexts), dtype=torch.int64)
        self._op = op = DecodeOperands()
        op.table, op.contexts, op.done = addresses(table, batch.context_lens_B, self._done)
        op.rows, op.most_blocks, op.window, op.chunk = len(contexts), table.stride(0), options.window, options.chunk
        op.scale, op.softcap = options.scale, options.softcap
        # Its tensors, which the kernel reads by address.
        self._batch = batch

    def run(self, query_TxHxD: Tensor, k_pool: Tensor, v_pool: Tensor, out_TxHxD: Tensor) -> None:
        """One layer's, written to the first rows of `out`; fp32, contiguous pools."""
        op, threads, (_, heads, dim) = self._op, torch.get_num_threads(), query_TxHxD.shape
        query = query_TxHxD[: op.rows].contiguous()
        parts, scores = torch.empty(self._items * heads * (dim + 2)), torch.empty(threads, heads * SPLIT)
        self._done.zero_()
        op.query, op.k_pool, op.v_pool, op.out, op.parts = addresses(query, k_pool, v_pool, out_TxHxD, parts)
        op.heads, op.dim, (op.page, op.kv_heads) = heads, dim, k_pool.shape[1:3]
        op.scratch, op.scratch_bytes = scores.data_ptr(), 4 * scores.stride(0)
        _decode.launch(op, threads)
