"""Attention of prompt chunks over the paged KV pool in fp32: FlashAttention's online softmax (Dao et al., 2022) on the
register tiles of `tile`.

Keys are taken in blocks of 64 that start at multiples of 64 of the sequence, whatever the chunk: so a row's result
depends (bitwise) on that row and its own context only, not on where the prompt was cut, the batch, or the threads.

Importing this module compiles the kernels, or loads them from numba's cache.
"""

from typing import Any

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from tandem.engine.backends.cpu.kernels.decode import exp_nonpositive, first_key
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
from tandem.engine.backends.cpu.kernels.softmax import weigh
from tandem.engine.backends.cpu.kernels.tile import COLUMNS, TILE_ROWS, register_tile
from tandem.engine.batch import AttentionOptions, PagedBatch

# Rows of a work item: whole register tiles, and scores and sums (12 KiB each) that stay in the second-level cache.
_ROWS = 8 * TILE_ROWS
_LOWEST = np.float32(-np.inf)
_LOG2E, _LN2 = np.float32(np.log2(np.e)), np.float32(np.log(2.0))
# Of each row: the largest score so far (times scale, in powers of two), the sum of weights, that of the last block.
_STATS_BYTES = 12


def _product_on(fresh: bool) -> Any:
    """A numba function for products of any number of rows: with sums so far, or fresh ones."""
    tile_1, tile_2, tile_3, tile_4, tile_5, tile_6 = (register_tile(rows, 0, fresh) for rows in range(1, 7))

    @njit(error_model="numpy")  # type: ignore[untyped-decorator]
    def product(rows: int, x: int, stride: int, weights: int, depth: int, sums: int, reach: int) -> None:
        """sums[rows, 64] (+)= x[rows, depth] @ weights[depth, 64]; x is 0 from input `reach + i` of row i on."""
        row = 0
        while row + TILE_ROWS <= rows:
            inputs = min(depth, reach + row + TILE_ROWS - 1)
            tile_6(x + stride * row, stride, weights, inputs, sums + 4 * COLUMNS * row, 0)
            row += TILE_ROWS
        x, sums, rest = x + stride * row, sums + 4 * COLUMNS * row, rows - row
        if rest == 1:
            tile_1(x, stride, weights, depth, sums, 0)
        elif rest == 2:
            tile_2(x, stride, weights, depth, sums, 0)
        elif rest == 3:
            tile_3(x, stride, weights, depth, sums, 0)
        elif rest == 4:
            tile_4(x, stride, weights, depth, sums, 0)
        elif rest == 5:
            tile_5(x, stride, weights, depth, sums, 0)

    return product


_write_product, _add_product = _product_on(fresh=True), _product_on(fresh=False)


@njit(fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def _cap(scores: Any, scale: Any, softcap: Any) -> None:
    """The soft cap, as scores that are yet to be multiplied by `scale`."""
    for t in range(COLUMNS):
        scores[t] = softcap / scale * np.float32(np.tanh(scores[t] * scale / softcap))


@njit(fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def _scale_row(out: int, parts: int, factor: Any) -> None:
    for part in range(parts):
        row = floats(out + 4 * COLUMNS * _ROWS * part, COLUMNS)
        for d in range(COLUMNS):
            row[d] *= factor


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _softmax_block(words: Any, rows: int, position: int, key: int, scores: int, stats: int, out: int) -> None:
    """Scores of 64 keys from `key` on become weights, and sums so far follow the new maximum; the first row is at
    `position`.
    """
    parts = (words[10] + COLUMNS - 1) // COLUMNS
    scale, softcap = float_of_bits(np.int32(words[12])), float_of_bits(np.int32(words[13]))
    for row in range(rows):
        last = min(position + row + 1 - key, COLUMNS)
        first = max(first_key(position + row, words[11], words[20]) - key, 0)
        score, stat = floats(scores + 4 * COLUMNS * row, COLUMNS), floats(stats + _STATS_BYTES * row, 3)
        if last <= first:
            score[:] = np.float32(0.0)
            continue
        old = stat[0]
        if softcap > np.float32(0.0):
            _cap(score, scale, softcap)
        whole = last - first == COLUMNS
        if not whole:
            score[:first], score[last:] = _LOWEST, _LOWEST
        top = weigh(scores + 4 * COLUMNS * row, scale * _LOG2E, old, stats + _STATS_BYTES * row + 8)
        if not whole:
            score[:first], score[last:] = np.float32(0.0), np.float32(0.0)
        if top > old:
            factor = exp_nonpositive((old - top) * _LN2) if old > _LOWEST else np.float32(0.0)
            stat[0], stat[1] = top, stat[1] * factor
            _scale_row(out + 4 * COLUMNS * row, parts, factor)
        stat[1] += stat[2]


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _attend(words: Any, head: int, first_row: int, rows: int, scratch: int) -> None:
    """One work item: `rows` rows of one head against all keys that they see."""
    heads, dim = words[8], words[10]
    parts = (dim + COLUMNS - 1) // COLUMNS
    scores, stats = scratch, scratch + 4 * COLUMNS * _ROWS
    out = stats + _STATS_BYTES * _ROWS
    floats(out, parts * _ROWS * COLUMNS)[:] = np.float32(0.0)
    state = floats(stats, 3 * _ROWS)
    state[0::3] = _LOWEST
    state[1::3] = np.float32(0.0)
    position = words[7] + first_row
    query = words[2] + words[16] * first_row + words[19] * head
    kv_head = head // (heads // words[9])
    oldest = first_key(position, words[11], words[20]) // COLUMNS
    for block in range(oldest, (position + rows - 1) // COLUMNS + 1):
        place = kv_head * words[15] + block - words[14]
        # Rows before the block's first key see none of it.
        skip = max(block * COLUMNS - position, 0)
        count, offset = rows - skip, 4 * COLUMNS * skip
        keys = words[3] + 4 * COLUMNS * dim * place
        _write_product(count, query + words[16] * skip, words[16], keys, dim, scores, dim)
        key = block * COLUMNS
        _softmax_block(words, count, position + skip, key, scores, stats + _STATS_BYTES * skip, out + offset)
        for part in range(parts):
            values = words[4] + 4 * COLUMNS * COLUMNS * (place * parts + part)
            sums = out + offset + 4 * COLUMNS * _ROWS * part
            _add_product(count, scores, 4 * COLUMNS, values, COLUMNS, sums, position + skip - key + 1)
    for row in range(rows):
        _scale_row(out + 4 * COLUMNS * row, parts, np.float32(1.0) / state[3 * row + 1])
        target = floats(words[5] + 4 * dim * (heads * (first_row + row) + head), dim)
        for part in range(parts):
            size = min(dim - COLUMNS * part, COLUMNS)
            target[COLUMNS * part : COLUMNS * part + size] = floats(out + 4 * COLUMNS * (_ROWS * part + row), size)


def _chunk(words_pointer: Any) -> None:
    """words: 0 ticket, 1 thread ticket, 2 q, 3 packed k, 4 packed v, 5 out, 6 rows, 7 first position, 8 heads,
    9 kv heads, 10 dim, 11 window, 12 scale, 13 softcap, 14 first key block, 15 key blocks, 16 bytes of a row of q,
    17 scratch, 18 its bytes for a thread, 19 bytes from a head of q to the next, 20 chunk.
    """
    words = carray(words_pointer, (21,))
    shared = np.int64(words.ctypes.data)
    scratch = words[17] + words[18] * atomic_add(shared + 8, 1)
    heads, tiles = words[8], (words[6] + _ROWS - 1) // _ROWS
    while True:
        item = atomic_add(shared, 1)
        if item >= heads * tiles:
            return
        # Head by head, whose keys and values stay in the second-level cache. The last rows see most keys and go first,
        # so that no thread starts a long item when the others end.
        first_row = (tiles - 1 - item % tiles) * _ROWS
        _attend(words, item // tiles, first_row, min(_ROWS, words[6] - first_row), scratch)


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _pack_key(key: int, dim: int, out: int) -> None:
    """One column of [dim, 64]."""
    source, column = floats(key, dim), floats(out, COLUMNS * (dim - 1) + 1)
    for d in range(dim):
        column[COLUMNS * d] = source[d]


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _pack_value(value: int, dim: int, out: int) -> None:
    """One row of each [64, 64]."""
    for start in range(0, dim, COLUMNS):
        size = min(dim - start, COLUMNS)
        floats(out + 4 * COLUMNS * start, size)[:] = floats(value + 4 * start, size)


def _pack(words_pointer: Any) -> None:
    """Keys as [kv head, block, dim, 64], values as [kv head, block, part, 64, 64 of dim]; zeros fill up.

    words: 0 ticket, 2 k pool, 3 v pool, 4 block table, 5 context, 6 kv heads, 7 dim, 8 page, 9 packed k, 10 packed v,
    11 first key block, 12 key blocks.
    """
    words = carray(words_pointer, (13,))
    context, kv_heads, dim, page, blocks = words[5], words[6], words[7], words[8], words[12]
    width, column_bytes = (dim + COLUMNS - 1) // COLUMNS * COLUMNS, 4 * COLUMNS
    table = carray(pointer(words[4]), ((context + page - 1) // page,), np.int32)
    while True:
        block = atomic_add(np.int64(words.ctypes.data), 1)
        if block >= blocks:
            return
        first = (words[11] + block) * COLUMNS
        count = min(COLUMNS, context - first)
        if count < COLUMNS or dim % COLUMNS:
            for place in range(block, kv_heads * blocks, blocks):
                floats(words[9] + column_bytes * dim * place, COLUMNS * dim)[:] = np.float32(0.0)
                floats(words[10] + column_bytes * width * place, COLUMNS * width)[:] = np.float32(0.0)
        # Token by token, as they lie in the pool.
        for t in range(count):
            slot = np.int64(table[(first + t) // page]) * page + (first + t) % page
            for head in range(kv_heads):
                place, offset = head * blocks + block, 4 * dim * (slot * kv_heads + head)
                _pack_key(words[2] + offset, dim, words[9] + column_bytes * dim * place + 4 * t)
                _pack_value(words[3] + offset, dim, words[10] + column_bytes * (width * place + t))


_CHUNK = kernel(_chunk)
_PACK = kernel(_pack)


def chunk_attention(
    query_QxHxD: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    batch: PagedBatch,
    sequence: int,
    options: AttentionOptions,
    out_QxHxD: Tensor,
) -> None:
    """Attention of a sequence's last Q rows over all of its C keys, written to `out`, which is contiguous.

    fp32, contiguous pools, a query whose heads are dense. Memory: the keys and values that the rows see, once more.
    """
    rows, heads, dim = query_QxHxD.shape
    page, kv_heads = k_pool.shape[1:3]
    context, threads = batch.context_lens[sequence], torch.get_num_threads()
    first_block = options.first_key(context - rows) // COLUMNS
    blocks = (context - 1) // COLUMNS - first_block + 1
    parts = -(-dim // COLUMNS)
    keys = torch.empty(kv_heads * blocks * dim * COLUMNS)
    values = torch.empty(kv_heads * blocks * parts * COLUMNS * COLUMNS)
    table = batch.block_table_BxM[sequence]
    launch(
        _PACK,
        *(k_pool.data_ptr(), v_pool.data_ptr(), table.data_ptr(), context, kv_heads, dim, page),
        *(keys.data_ptr(), values.data_ptr(), first_block, blocks),
        threads=threads,
    )
    scratch = torch.empty(threads, _ROWS * (COLUMNS * (1 + parts) + 3))
    row_bytes, head_bytes = 4 * query_QxHxD.stride(0), 4 * query_QxHxD.stride(1)
    launch(
        _CHUNK,
        *(query_QxHxD.data_ptr(), keys.data_ptr(), values.data_ptr(), out_QxHxD.data_ptr()),
        *(rows, context - rows, heads, kv_heads, dim, options.window),
        *(bits_of_float(options.scale), bits_of_float(options.softcap)),
        *(first_block, blocks, row_bytes, scratch.data_ptr(), 4 * scratch.stride(0), head_bytes),
        options.chunk,
        threads=threads,
    )
