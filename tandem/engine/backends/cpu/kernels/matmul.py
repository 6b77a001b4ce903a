"""Matrix products with weights in oneDNN's packed layout; fp32.

For a few rows (a decode step) at the memory's speed: oneDNN waits for weights and multiplies in turn. Here a thread
walks its share of the weights once, in memory order, a tile at a time: all rows use a tile while it is in the
first-level cache, and fetching the next tiles is spread evenly over that work. For many rows (a prompt)
a block of them and a tile of weights stay in the second-level cache, and SwiGLU is done before the sums leave it.

Each output is one chain of fused multiply-adds over the inputs in order, so a row's result does not depend (bitwise) on
the rows beside it, on how many they are, or on the threads.

Importing this module compiles the kernels, or loads them from numba's cache.
"""

import ctypes
from typing import Any

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from tandem.engine.backends.cpu.kernels.parallel import FAST, atomic_add, floats, kernel, launch
from tandem.engine.backends.cpu.kernels.rowwise import silu_multiply
from tandem.engine.backends.cpu.kernels.tile import COLUMNS, TILE_ROWS, register_tile, registers_suffice

# Up to so many rows the product is bound by the reading of weights, above by arithmetic.
_FEW_ROWS = 48
# Inputs of one tile of weights, 16 KiB: half of the first-level cache.
_DEPTH = 64
# How far ahead weights are fetched, in tiles.
_AHEAD = 2
# Many rows are taken in blocks of this many (whole register tiles), and tiles of weights are as deep as lets both
# stay in the second-level cache: a visit to the sums costs some multiplications.
_MANY_ROWS = 20 * TILE_ROWS
_MANY_DEPTH = 384
# Shares of the columns for each thread, so that one which is held up leaves work to the others.
_MANY_SHARES = 2
_LINE_BYTES = 64

# A tile that is passed once fetches all that is ahead as it goes, 4 lines an input; of more passes each takes a part:
# a half of it where rows are few, else a quarter, again and again.
_ONLY_1, _ONLY_2, _ONLY_3, _ONLY_4, _ONLY_5, _ONLY_6 = (register_tile(rows, 4) for rows in range(1, 7))
_PART_3, _PART_4, _PART_5, _PART_6 = (register_tile(rows, 2) for rows in range(3, 7))
_MANY_5, _MANY_6 = (register_tile(rows, 1) for rows in (5, 6))


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _only_pass(rows: int, x: int, stride: int, weights: int, depth: int, sums: int, ahead: int) -> None:
    if rows == 1:
        _ONLY_1(x, stride, weights, depth, sums, ahead)
    elif rows == 2:
        _ONLY_2(x, stride, weights, depth, sums, ahead)
    elif rows == 3:
        _ONLY_3(x, stride, weights, depth, sums, ahead)
    elif rows == 4:
        _ONLY_4(x, stride, weights, depth, sums, ahead)
    elif rows == 5:
        _ONLY_5(x, stride, weights, depth, sums, ahead)
    else:
        _ONLY_6(x, stride, weights, depth, sums, ahead)


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _part_pass(rows: int, x: int, stride: int, weights: int, depth: int, sums: int, ahead: int) -> None:
    if rows == 3:
        _PART_3(x, stride, weights, depth, sums, ahead)
    elif rows == 4:
        _PART_4(x, stride, weights, depth, sums, ahead)
    elif rows == 5:
        _PART_5(x, stride, weights, depth, sums, ahead)
    else:
        _PART_6(x, stride, weights, depth, sums, ahead)


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _many_pass(rows: int, x: int, stride: int, weights: int, depth: int, sums: int, ahead: int) -> None:
    if rows == 5:
        _MANY_5(x, stride, weights, depth, sums, ahead)
    else:
        _MANY_6(x, stride, weights, depth, sums, ahead)


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def block_sums(x: int, stride: int, rows: int, weights: int, inputs: int, sums: int) -> None:
    """sums[rows, 64] = x[rows, inputs] @ weights[inputs, 64]."""
    floats(sums, rows * COLUMNS)[:] = np.float32(0.0)
    passes, few = (rows + TILE_ROWS - 1) // TILE_ROWS, rows <= _FEW_ROWS
    most = _DEPTH if few else _MANY_DEPTH
    for k in range(0, inputs, most):
        depth = min(most, inputs - k)
        tile = weights + 4 * COLUMNS * k
        ahead = tile + 4 * COLUMNS * (_AHEAD * _DEPTH if few else depth)
        row = 0
        for i in range(passes):
            count = rows // passes + (1 if i < rows % passes else 0)
            source, target = x + 4 * k + stride * row, sums + 4 * COLUMNS * row
            if passes == 1:
                _only_pass(count, source, stride, tile, depth, target, ahead)
            elif few:
                _part_pass(count, source, stride, tile, depth, target, ahead + depth * 2 * _LINE_BYTES * i)
            else:
                _many_pass(count, source, stride, tile, depth, target, ahead + depth * _LINE_BYTES * (i % 4))
            row += count


@njit(fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def add_bias(sums: int, rows: int, bias: int) -> None:
    if bias != 0:
        b = floats(bias, COLUMNS)
        for row in range(rows):
            y = floats(sums + 4 * COLUMNS * row, COLUMNS)
            for i in range(COLUMNS):
                y[i] += b[i]


@njit(fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def _write_row(sums: int, residual: int, out: int) -> None:
    total, y = floats(sums, COLUMNS), floats(out, COLUMNS)
    if residual == 0:
        y[:] = total
    else:
        before = floats(residual, COLUMNS)
        for i in range(COLUMNS):
            y[i] = before[i] + total[i]


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _columns(words: Any, block: int, first_row: int, rows: int, sums: int) -> None:
    """Outputs 64 * block to 64 * block + 63 of some rows."""
    x, stride, inputs, offset = words[2] + words[3] * first_row, words[3], words[5], 4 * COLUMNS * block
    block_sums(x, stride, rows, words[6] + offset * inputs, inputs, sums)
    add_bias(sums, rows, words[7] + offset if words[7] != 0 else 0)
    if words[13] != 0:
        second = sums + 4 * COLUMNS * rows
        block_sums(x, stride, rows, words[13] + offset * inputs, inputs, second)
        add_bias(second, rows, words[14] + offset if words[14] != 0 else 0)
        silu_multiply(sums, second, rows * COLUMNS)
    for row in range(rows):
        at = words[10] * (first_row + row) + offset
        _write_row(sums + 4 * COLUMNS * row, words[17] + at if words[17] != 0 else 0, words[9] + at)


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def work_item(item: int, rows: int, blocks: int, shares: int, row_blocks: int) -> Any:
    """Of a product: first row and the one past the last, first block of columns and the one past the last.

    Nothing is left when the first of them is `rows`. A share is contiguous, so that fetching ahead runs on into the
    next block; but the last of many rows are handed out block by block, so that all threads end at about the same time.
    """
    row_block, share = item // shares, item % shares
    if row_block >= row_blocks - 1 > 0:
        row_block, share, shares = row_blocks - 1, item - (row_blocks - 1) * shares, blocks
    if share >= shares or row_block >= row_blocks:
        return rows, rows, 0, 0
    first, last = row_block * rows // row_blocks, (row_block + 1) * rows // row_blocks
    return first, last, share * blocks // shares, (share + 1) * blocks // shares


def _product(words_pointer: Any) -> None:
    """words: 0 ticket, 2 x, 3 its row stride, 4 rows, 5 inputs, 6 weights, 7 bias, 8 column blocks, 9 out,
    10 its row stride, 11 scratch, 12 its bytes for a thread, 13 weights of a second factor or 0, 14 its bias,
    15 shares of the columns, 16 row blocks, 17 what to add, with the strides of out, or 0; strides in bytes.
    """
    words = carray(words_pointer, (18,))
    shared, rows = np.int64(words.ctypes.data), words[4]
    sums = words[11] + words[12] * atomic_add(shared + 8, 1)
    while True:
        item = atomic_add(shared, 1)
        first, last, block, end = work_item(item, rows, words[8], words[15], words[16])
        if first == rows:
            return
        while block < end:
            _columns(words, block, first, last - first, sums)
            block += 1


_PRODUCT = kernel(_product)


def weights_address(packed_NxK: Tensor, weight_NxK: Tensor) -> int:
    """Where oneDNN keeps these packed weights; 0 where this module cannot read them.

    That is on processors without AVX-512, and where oneDNN chose another layout than [N / 64, K, 64]: its choice is
    an implementation detail, so the first and last blocks are compared with the weights themselves.
    """
    outputs, inputs = weight_NxK.shape
    if outputs % COLUMNS or not registers_suffice() or not hasattr(torch.ops.mkldnn, "data_ptr"):
        return 0
    address = int(torch.ops.mkldnn.data_ptr(packed_NxK))
    for first in (0, outputs - COLUMNS):
        memory = (ctypes.c_float * (inputs * COLUMNS)).from_address(address + 4 * first * inputs)
        block_KxC = torch.frombuffer(memory, dtype=torch.float32).view(inputs, COLUMNS)
        if not torch.equal(block_KxC.t(), weight_NxK[first : first + COLUMNS]):
            return 0
    return address


def product(
    x: Tensor,
    weights: int,
    bias_N: Tensor | None,
    outputs: int,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x @ weight.T + bias; `weights` is a `weights_address`. Any leading dimensions.

    residual: contiguous, added to that. out: contiguous, where the result goes; it may be the residual.
    """
    return _run(x, (weights, address(bias_N)), (0, 0), outputs, address(residual), out)


def gated_product(
    x: Tensor, gate: int, gate_bias_N: Tensor | None, up: int, up_bias_N: Tensor | None, n: int
) -> Tensor:
    """silu(x @ gate.T + bias) * (x @ up.T + bias) with n outputs."""
    return _run(x, (gate, address(gate_bias_N)), (up, address(up_bias_N)), n, 0, None)


def _run(
    x: Tensor, first: tuple[int, int], second: tuple[int, int], outputs: int, residual: int, out: Tensor | None
) -> Tensor:
    source, inputs = x.contiguous(), x.shape[-1]
    rows, threads = source.numel() // inputs, torch.get_num_threads()
    shares, row_blocks = split(rows, threads)
    out = torch.empty((*x.shape[:-1], outputs)) if out is None else out
    scratch = torch.empty(threads, 2 * COLUMNS * -(-rows // row_blocks))
    launch(
        _PRODUCT,
        *(source.data_ptr(), 4 * inputs, rows, inputs, *first, outputs // COLUMNS, out.data_ptr(), 4 * outputs),
        *(scratch.data_ptr(), 4 * scratch.stride(0), *second, shares, row_blocks, residual),
        threads=threads,
    )
    return out


def split(rows: int, threads: int) -> tuple[int, int]:
    """Into how many shares of the columns, and blocks of rows, a product is cut: see work_item."""
    return (threads, 1) if rows <= _FEW_ROWS else (threads * _MANY_SHARES, -(-rows // _MANY_ROWS))


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
