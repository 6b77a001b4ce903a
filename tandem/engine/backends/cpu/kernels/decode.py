"""numba kernels over the paged KV pool (fp32): writing the step's keys and values, and decode attention.

Importing this module compiles the kernels, or loads them from numba's cache: import it late (see
`backends/cpu/attention.py`).
"""

from typing import Any

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from tandem.engine.backends.cpu.kernels.parallel import (
    FAST,
    atomic_add,
    bits_of_float,
    float_of_bits,
    floats,
    kernel,
    launch,
    pointer,
)
from tandem.engine.batch import AttentionOptions, PagedBatch

# Keys one work item covers. A constant, so that a row's arithmetic depends on its own context alone, never on the
# batch or the thread count. Small enough to give two cores work at a context of 128, large enough that the partial
# results (one row per item) stay below a few percent of the K and V read.
SPLIT = 64

_LOG2E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)


@njit(inline="always", fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def exp_nonpositive(x: Any) -> Any:
    """exp for x <= 0 within 2 ulp (Cephes expf), in a form that LLVM vectorises; below -87 it gives exp(-87)."""
    x = max(x, np.float32(-87.0))
    n = np.int32(x * _LOG2E - np.float32(0.5))
    r = (x - np.float32(n) * _LN2_HIGH) - np.float32(n) * _LN2_LOW
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    return p * float_of_bits(np.int32((n + np.int32(127)) << np.int32(23)))


@njit(fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
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


@njit(fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
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


@njit(fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
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


@njit(fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
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


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def first_key(position: int, window: int, chunk: int) -> int:
    """The same as AttentionOptions.first_key."""
    first: int = max(position + 1 - window, 0) if window > 0 else 0
    return max(first, position // chunk * chunk) if chunk > 0 else first


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _num_splits(context: int, window: int, chunk: int) -> int:
    splits: int = (context - 1) // SPLIT - first_key(context - 1, window, chunk) // SPLIT + 1
    return splits


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _attend_split(words: Any, sequence: int, first: int, last: int, scores: int, part: int) -> None:
    """One work item: keys first <= position < last of one sequence; `part` gets stats and the unnormalised sum."""
    heads, kv_heads, dim, page = words[9], words[10], words[11], words[12]
    query = words[2] + 4 * heads * dim * sequence
    table = carray(pointer(words[6] + 4 * words[13] * sequence), (words[13],), np.int32)
    page_bytes = 4 * page * kv_heads * dim
    token_bytes = 4 * kv_heads * dim
    position = first
    while position < last:
        run = min(page - position % page, last - position)
        where = np.int64(table[position // page]) * page_bytes + (position % page) * token_bytes
        _score_run(query, words[3] + where, run, heads, kv_heads, dim, scores + 4 * (position - first))
        position += run
    scale = float_of_bits(np.int32(words[15]))
    _softmax_rows(scores, heads, last - first, scale, float_of_bits(np.int32(words[16])), part)
    out = part + 8 * heads
    floats(out, heads * dim)[:] = np.float32(0.0)
    position = first
    while position < last:
        run = min(page - position % page, last - position)
        where = np.int64(table[position // page]) * page_bytes + (position % page) * token_bytes
        _sum_run(scores + 4 * (position - first), words[4] + where, run, heads, kv_heads, dim, out)
        position += run


def _decode(words_pointer: Any) -> None:
    """words: 0 ticket, 1 thread ticket, 2 q, 3 k pool, 4 v pool, 5 out, 6 table, 7 contexts, 8 rows, 9 heads,
    10 kv heads, 11 dim, 12 page, 13 table width, 14 window, 15 scale, 16 softcap, 17 parts, 18 scores, 19 done,
    20 chunk.
    """
    words = carray(words_pointer, (21,))
    shared = np.int64(words.ctypes.data)
    rows, heads, dim, window, chunk = words[8], words[9], words[11], words[14], words[20]
    contexts = carray(pointer(words[7]), (rows,), np.int32)
    part_bytes = 4 * heads * (dim + 2)
    scores = words[18] + atomic_add(shared + 8, 1) * 4 * heads * SPLIT
    sequence, before = 0, 0
    item = atomic_add(shared, 1)
    while True:
        # Tickets only grow, so the search for an item's sequence goes on from the last one.
        while sequence < rows and item >= before + _num_splits(contexts[sequence], window, chunk):
            before += _num_splits(contexts[sequence], window, chunk)
            sequence += 1
        if sequence == rows:
            return
        context = np.int64(contexts[sequence])
        start = first_key(context - 1, window, chunk)
        split = start // SPLIT + item - before
        first, last = max(split * SPLIT, start), min(split * SPLIT + SPLIT, context)
        _attend_split(words, sequence, first, last, scores, words[17] + item * part_bytes)
        count = _num_splits(context, window, chunk)
        # Whoever ends a sequence's last item merges it; the order of the merge is that of the context.
        if atomic_add(words[19] + 8 * sequence, 1) == count - 1:
            _merge(words[17] + before * part_bytes, count, heads, dim, words[5] + 4 * heads * dim * sequence)
        item = atomic_add(shared, 1)


def _store(words_pointer: Any) -> None:
    """words: 0 ticket, 2 key, 3 its row stride, 4 value, 5 its row stride, 6 k pool, 7 v pool, 8 slots, 9 rows,
    10 row size.
    """
    words = carray(words_pointer, (11,))
    size = words[10]
    slots = carray(pointer(words[8]), (words[9],), np.int64)
    while True:
        first = atomic_add(np.int64(words.ctypes.data), 1) * SPLIT
        if first >= words[9]:
            return
        for row in range(first, min(first + SPLIT, words[9])):
            place = 4 * size * slots[row]
            floats(words[6] + place, size)[:] = floats(words[2] + 4 * words[3] * row, size)
            floats(words[7] + place, size)[:] = floats(words[4] + 4 * words[5] * row, size)


DECODE = kernel(_decode)
STORE = kernel(_store)


def store_rows(key_TxKxD: Tensor, value_TxKxD: Tensor, k_pool: Tensor, v_pool: Tensor, slots_T: Tensor) -> None:
    """Copy each token's key and value to its slot of the pools; fp32, rows and pools dense."""
    rows, size = key_TxKxD.shape[0], key_TxKxD[0].numel()
    launch(
        STORE,
        *(key_TxKxD.data_ptr(), key_TxKxD.stride(0), value_TxKxD.data_ptr(), value_TxKxD.stride(0)),
        *(k_pool.data_ptr(), v_pool.data_ptr(), slots_T.data_ptr(), rows, size),
        threads=torch.get_num_threads() if rows > SPLIT else 1,
    )


def decode_attention(
    query_BxHxD: Tensor, k_pool: Tensor, v_pool: Tensor, batch: PagedBatch, options: AttentionOptions, out: Tensor
) -> None:
    """Attention of the step's decode rows, written to the first rows of `out` [T, H, D]; fp32, contiguous pools."""
    rows, heads, dim = query_BxHxD.shape
    query = query_BxHxD.contiguous()
    page, kv_heads = k_pool.shape[1:3]
    splits = sum(_splits_of(context, options) for context in batch.context_lens[:rows])
    parts = torch.empty(splits * heads * (dim + 2))
    threads = torch.get_num_threads()
    scores = torch.empty(threads * heads * SPLIT)
    done = torch.zeros(rows, dtype=torch.int64)
    table, contexts = batch.block_table_BxM, batch.context_lens_B
    launch(
        DECODE,
        *(t.data_ptr() for t in (query, k_pool, v_pool, out, table, contexts)),
        *(rows, heads, kv_heads, dim, page, table.stride(0), options.window),
        *(bits_of_float(options.scale), bits_of_float(options.softcap)),
        *(parts.data_ptr(), scores.data_ptr(), done.data_ptr(), options.chunk),
        threads=threads,
    )


def _splits_of(context: int, options: AttentionOptions) -> int:
    return (context - 1) // SPLIT - options.first_key(context - 1) // SPLIT + 1
