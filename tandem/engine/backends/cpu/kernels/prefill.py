"""Attention of prompt chunks over the paged KV pool in fp32: FlashAttention's online softmax (Dao et al., 2022) on the
register tiles of `tile.py`.

Keys are taken in blocks of 64 that start at multiples of 64 of the sequence, whatever the chunk: so a row's result
depends (bitwise) on that row and its own context only, not on where the prompt was cut, the batch, or the threads.

Importing this module compiles the kernels, or loads them from numba's cache.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tandem.engine.backends.cpu.kernels.launch import Kernel, addresses, operands, slots
from tandem.engine.backends.cpu.kernels.parts import (
    copy,
    exp_nonpositive,
    fast_jit,
    first_key,
    floats,
    int32s,
    jit,
    next_ticket,
    own_scratch,
)
from tandem.engine.backends.cpu.kernels.softmax import weigh
from tandem.engine.backends.cpu.kernels.tile import COLUMNS, TILE_ROWS, register_tile
from tandem.engine.batch import AttentionOptions, PagedBatch

# Rows of a work item: whole register tiles, and scores and sums (12 KiB each) that stay in the second-level cache.
_ROWS = 8 * TILE_ROWS
_LOWEST = np.float32(-np.inf)
_LOG2E, _LN2 = np.float32(np.log2(np.e)), np.float32(np.log(2.0))
# A row's largest score so far (times scale, in powers of two), its sum of weights, that of the last block.
_STATS_BYTES = 12


@operands
class PackOperands:
    # Pools [N, P, K, D]; keys [K, blocks, D, 64] and values [K, blocks, parts, 64, 64] of the sequence, zeros fill up.
    k_pool, v_pool, keys, values = slots(4)
    # int32.
    table_M, context = slots(2)
    kv_heads, dim, parts, page, first_block, blocks = slots(6)


@operands
class ChunkOperands:
    # [Q, H, D], and strides in bytes; packed; [Q, H, D], dense.
    query, row_stride, head_stride, keys, values, out = slots(6)
    rows, heads, kv_heads, dim, parts, first_block, blocks = slots(7)
    # The first row's, and what a row sees.
    position, window, chunk = slots(3)
    scale, softcap = slots(2, ctypes.c_float)
    # Scores [_ROWS, 64], stats, and sums [parts, _ROWS, 64] of a thread.
    scratch, scratch_bytes = slots(2)


def _product_on(fresh: bool) -> Callable[..., None]:
    """A numba function for products of any number of rows: with sums so far, or fresh ones."""
    tile = register_tile(range(1, TILE_ROWS + 1), lines=0, fresh=fresh)

    @jit
    def product(rows: int, x: int, stride: int, weights: int, depth: int, sums: int, reach: int) -> None:
        """sums[rows, 64] (+)= x[rows, depth] @ weights[depth, 64]; x is 0 from input `reach + i` of row i on."""
        for row in range(0, rows, TILE_ROWS):
            count = min(TILE_ROWS, rows - row)
            inputs = min(depth, reach + row + count - 1)
            tile(count, x + stride * row, stride, weights, inputs, sums + 4 * COLUMNS * row, 0)

    return product


_write_product, _add_product = _product_on(fresh=True), _product_on(fresh=False)


@fast_jit
def _cap(scores: Any, scale: Any, softcap: Any) -> None:
    """The soft cap, as scores that are yet to be multiplied by `scale`."""
    for t in range(COLUMNS):
        scores[t] = softcap / scale * np.float32(np.tanh(scores[t] * scale / softcap))


@fast_jit
def _scale_row(out: int, parts: int, factor: Any) -> None:
    for part in range(parts):
        row = floats(out + 4 * COLUMNS * _ROWS * part, COLUMNS)
        for d in range(COLUMNS):
            row[d] *= factor


@jit
def _softmax_block(op: ChunkOperands, rows: int, position: int, key: int, scores: int, stats: int, out: int) -> None:
    """Scores of 64 keys from `key` on become weights, and sums so far follow the new maximum; the first row is at
    `position`.
    """
    for row in range(rows):
        last = min(position + row + 1 - key, COLUMNS)
        first = max(first_key(position + row, op.window, op.chunk) - key, 0)
        score, stat = floats(scores + 4 * COLUMNS * row, COLUMNS), floats(stats + _STATS_BYTES * row, 3)
        if last <= first:
            score[:] = np.float32(0.0)
            continue
        old = stat[0]
        if op.softcap > np.float32(0.0):
            _cap(score, op.scale, op.softcap)
        whole = last - first == COLUMNS
        if not whole:
            score[:first], score[last:] = _LOWEST, _LOWEST
        top = weigh(scores + 4 * COLUMNS * row, op.scale * _LOG2E, old, stats + _STATS_BYTES * row + 8)
        if not whole:
            score[:first], score[last:] = np.float32(0.0), np.float32(0.0)
        if top > old:
            factor = exp_nonpositive((old - top) * _LN2) if old > _LOWEST else np.float32(0.0)
            stat[0], stat[1] = top, stat[1] * factor
            _scale_row(out + 4 * COLUMNS * row, op.parts, factor)
        stat[1] += stat[2]


@jit
def _attend(op: ChunkOperands, head: int, first_row: int, rows: int, scores: int) -> None:
    """One work item: `rows` rows of one head against all keys that they see."""
    dim, parts = op.dim, op.parts
    stats = scores + 4 * COLUMNS * _ROWS
    out = stats + _STATS_BYTES * _ROWS
    floats(out, parts * _ROWS * COLUMNS)[:] = np.float32(0.0)
    state = floats(stats, 3 * _ROWS)
    state[0::3] = _LOWEST
    state[1::3] = np.float32(0.0)
    position = op.position + first_row
    query = op.query + op.row_stride * first_row + op.head_stride * head
    kv_head = head // (op.heads // op.kv_heads)
    oldest = first_key(position, op.window, op.chunk) // COLUMNS
    for block in range(oldest, (position + rows - 1) // COLUMNS + 1):
        place = kv_head * op.blocks + block - op.first_block
        # Rows before the block's first key see none of it.
        skip = max(block * COLUMNS - position, 0)
        count, offset = rows - skip, 4 * COLUMNS * skip
        keys = op.keys + 4 * COLUMNS * dim * place
        _write_product(count, query + op.row_stride * skip, op.row_stride, keys, dim, scores, dim)
        key = block * COLUMNS
        _softmax_block(op, count, position + skip, key, scores, stats + _STATS_BYTES * skip, out + offset)
        for part in range(parts):
            values = op.values + 4 * COLUMNS * COLUMNS * (place * parts + part)
            sums = out + offset + 4 * COLUMNS * _ROWS * part
            _add_product(count, scores, 4 * COLUMNS, values, COLUMNS, sums, position + skip - key + 1)
    for row in range(rows):
        _scale_row(out + 4 * COLUMNS * row, parts, np.float32(1.0) / state[3 * row + 1])
        target = op.out + 4 * dim * (op.heads * (first_row + row) + head)
        for part in range(parts):
            source = out + 4 * COLUMNS * (_ROWS * part + row)
            copy(source, target + 4 * COLUMNS * part, min(dim - COLUMNS * part, COLUMNS))


@Kernel
def _chunk(op: ChunkOperands) -> None:
    scratch = own_scratch(op)
    tiles = (op.rows + _ROWS - 1) // _ROWS
    while True:
        item = next_ticket(op)
        if item >= op.heads * tiles:
            return
        # Head by head, whose keys and values stay in the second-level cache. The last rows see most keys and go first,
        # so that no thread starts a long item when the others end.
        first_row = (tiles - 1 - item % tiles) * _ROWS
        _attend(op, item // tiles, first_row, min(_ROWS, op.rows - first_row), scratch)


@jit
def _pack_key(key: int, dim: int, out: int) -> None:
    """One column of [dim, 64]."""
    source, column = floats(key, dim), floats(out, COLUMNS * (dim - 1) + 1)
    for d in range(dim):
        column[COLUMNS * d] = source[d]


@jit
def _pack_value(value: int, dim: int, out: int) -> None:
    """One row of each [64, 64]."""
    for start in range(0, dim, COLUMNS):
        copy(value + 4 * start, out + 4 * COLUMNS * start, min(dim - start, COLUMNS))


@Kernel
def _pack(op: PackOperands) -> None:
    kv_heads, dim, page, blocks = op.kv_heads, op.dim, op.page, op.blocks
    width, column_bytes = COLUMNS * op.parts, 4 * COLUMNS
    table = int32s(op.table_M, (op.context + page - 1) // page)
    while True:
        block = next_ticket(op)
        if block >= blocks:
            return
        first = (op.first_block + block) * COLUMNS
        count = min(COLUMNS, op.context - first)
        if count < COLUMNS or dim % COLUMNS:
            for place in range(block, kv_heads * blocks, blocks):
                floats(op.keys + column_bytes * dim * place, COLUMNS * dim)[:] = np.float32(0.0)
                floats(op.values + column_bytes * width * place, COLUMNS * width)[:] = np.float32(0.0)
        # Token by token, as they lie in the pool.
        for t in range(count):
            slot = np.int64(table[(first + t) // page]) * page + (first + t) % page
            for head in range(kv_heads):
                place, offset = head * blocks + block, 4 * dim * (slot * kv_heads + head)
                _pack_key(op.k_pool + offset, dim, op.keys + column_bytes * dim * place + 4 * t)
                _pack_value(op.v_pool + offset, dim, op.values + column_bytes * (width * place + t))


class ChunkPlan:
    """Attention of a sequence's chunk in one step, over its blocks, for all layers that ask for the same."""

    def __init__(self, batch: PagedBatch, sequence: int, options: AttentionOptions) -> None:
        first, last = batch.query_starts[sequence : sequence + 2]
        self._rows = slice(first, last)
        context = batch.context_lens[sequence]
        self._pack, self._op = pack, op = PackOperands(), ChunkOperands()
        pack.table_M, pack.context = batch.block_table_BxM[sequence].data_ptr(), context
        op.rows, op.position = last - first, context - (last - first)
        op.first_block = pack.first_block = options.first_key(op.position) // COLUMNS
        op.blocks = pack.blocks = (context - 1) // COLUMNS - op.first_block + 1
        op.window, op.chunk, op.scale, op.softcap = options.window, options.chunk, options.scale, options.softcap
        # Its tensors, which the kernels read by address.
        self._batch = batch

    def run(self, query_TxHxD: Tensor, k_pool: Tensor, v_pool: Tensor, out_TxHxD: Tensor) -> None:
        """One layer's, written to the chunk's rows of `out`, which is contiguous.

        fp32, contiguous pools, a query whose heads are dense. Memory: the keys and values that the rows see, once more.
        """
        pack, op, threads = self._pack, self._op, torch.get_num_threads()
        query, out = query_TxHxD[self._rows], out_TxHxD[self._rows]
        (_, heads, dim), (page, kv_heads) = query.shape, k_pool.shape[1:3]
        parts = -(-dim // COLUMNS)
        keys = torch.empty(kv_heads * op.blocks * dim * COLUMNS)
        values = torch.empty(kv_heads * op.blocks * parts * COLUMNS * COLUMNS)
        pack.k_pool, pack.v_pool, pack.keys, pack.values = addresses(k_pool, v_pool, keys, values)
        pack.kv_heads, pack.dim, pack.parts, pack.page = kv_heads, dim, parts, page
        _pack.launch(pack, threads)
        scratch = torch.empty(threads, _ROWS * (COLUMNS * (1 + parts) + 3))
        op.query, op.keys, op.values, op.out = addresses(query, keys, values, out)
        op.row_stride, op.head_stride = 4 * query.stride(0), 4 * query.stride(1)
        op.heads, op.kv_heads, op.dim, op.parts = heads, kv_heads, dim, parts
        op.scratch, op.scratch_bytes = scratch.data_ptr(), 4 * scratch.stride(0)
        _chunk.launch(op, threads)
