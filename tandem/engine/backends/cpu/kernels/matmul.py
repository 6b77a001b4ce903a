"""Matrix products with weights in oneDNN's packed layout; fp32.

For a few rows (a decode step) at the memory's speed: oneDNN waits for weights and multiplies in turn. Here a thread
walks its share of the weights once, in memory order, a tile at a time: all rows use a tile while it is in the
first-level cache, and fetching the next tiles is spread evenly over that work. For many rows (a prompt)
a block of them and a tile of weights stay in the second-level cache, and SwiGLU is done before the sums leave it.

Each output is one chain of fused multiply-adds over the inputs in order, so a row's result does not depend (bitwise) on
the rows beside it, on how many they are, or on the threads.

Importing this module compiles the kernels, or loads them from numba's cache.
"""

from __future__ import annotations

import ctypes
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tandem.engine.backends.cpu.kernels.launch import Kernel, addresses, operands, slots
from tandem.engine.backends.cpu.kernels.parts import (
    copy,
    fast_jit,
    floats,
    jit,
    next_ticket,
    own_scratch,
    silu_multiply,
)
from tandem.engine.backends.cpu.kernels.tile import COLUMNS, LINE_BYTES, TILE_ROWS, register_tile, registers_suffice

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

# A tile that is passed once fetches all that is ahead as it goes, 4 lines an input; of more passes each takes a part:
# a half of it where rows are few, else a quarter, again and again.
_only_pass, _part_pass = register_tile(range(1, 7), lines=4), register_tile(range(3, 7), lines=2)
_many_pass = register_tile((5, 6), lines=1)


@operands
class ProductOperands:
    # Strides in bytes.
    x, stride, rows, inputs, weights, bias, out, out_stride = slots(8)
    # A second factor's, and what to add, with the strides of `out`: 0 where there is none.
    second_weights, second_bias, residual = slots(3)
    # Blocks of columns, the shares that they are handed out in, and blocks of rows.
    units, shares, row_blocks = slots(3)
    scratch, scratch_bytes = slots(2)


@jit
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
                _part_pass(count, source, stride, tile, depth, target, ahead + depth * 2 * LINE_BYTES * i)
            else:
                _many_pass(count, source, stride, tile, depth, target, ahead + depth * LINE_BYTES * (i % 4))
            row += count


@fast_jit
def add_bias(sums: int, rows: int, bias: int, offset: int) -> None:
    """Adds 64 numbers, `offset` bytes after the start of a bias, to all rows; nothing where the bias is 0."""
    if bias != 0:
        b = floats(bias + offset, COLUMNS)
        for row in range(rows):
            y = floats(sums + 4 * COLUMNS * row, COLUMNS)
            for i in range(COLUMNS):
                y[i] += b[i]


@fast_jit
def _write_row(sums: int, residual: int, out: int) -> None:
    if residual == 0:
        copy(sums, out, COLUMNS)
    else:
        total, y, before = floats(sums, COLUMNS), floats(out, COLUMNS), floats(residual, COLUMNS)
        for i in range(COLUMNS):
            y[i] = before[i] + total[i]


@jit
def _columns(op: ProductOperands, block: int, first_row: int, rows: int, sums: int) -> None:
    """Outputs 64 * block to 64 * block + 63 of some rows."""
    x, offset = op.x + op.stride * first_row, 4 * COLUMNS * block
    block_sums(x, op.stride, rows, op.weights + offset * op.inputs, op.inputs, sums)
    add_bias(sums, rows, op.bias, offset)
    if op.second_weights != 0:
        second = sums + 4 * COLUMNS * rows
        block_sums(x, op.stride, rows, op.second_weights + offset * op.inputs, op.inputs, second)
        add_bias(second, rows, op.second_bias, offset)
        silu_multiply(sums, second, rows * COLUMNS)
    for row in range(rows):
        at = op.out_stride * (first_row + row) + offset
        _write_row(sums + 4 * COLUMNS * row, op.residual + at if op.residual != 0 else 0, op.out + at)


@jit
def next_share(op: Any) -> Any:
    """Work that no thread has yet: first row and the one past the last, first unit and the one past the last.

    Nothing is left when the first of them is `rows`. A share is contiguous, so that fetching ahead runs on into the
    next block; but the last of many rows are handed out block by block, so that all threads end at about the same time.
    """
    item, shares, row_blocks = next_ticket(op), op.shares, op.row_blocks
    row_block, share = item // shares, item % shares
    if row_block >= row_blocks - 1 > 0:
        row_block, share, shares = row_blocks - 1, item - (row_blocks - 1) * shares, op.units
    if share >= shares or row_block >= row_blocks:
        return op.rows, op.rows, 0, 0
    first, last = row_block * op.rows // row_blocks, (row_block + 1) * op.rows // row_blocks
    return first, last, share * op.units // shares, (share + 1) * op.units // shares


@Kernel
def _product(op: ProductOperands) -> None:
    sums = own_scratch(op)
    first, last, block, end = next_share(op)
    while first < op.rows:
        for each in range(block, end):
            _columns(op, each, first, last - first, sums)
        first, last, block, end = next_share(op)


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


class Matrix(Protocol):
    """A weight [N, K] in oneDNN's packed layout at a `weights_address`, and a bias [N]."""

    address: int
    bias: Tensor | None
    out_features: int


def product(x: Tensor, matrix: Matrix, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias: [..., K] to [..., N].

    residual: contiguous, added to that. out: contiguous, where the result goes; it may be the residual.
    """
    op = ProductOperands()
    (op.residual,) = addresses(residual)
    return _run(op, x, matrix, out)


def gated_product(x: Tensor, gate: Matrix, up: Matrix) -> Tensor:
    """silu(x @ gate.T + bias) * (x @ up.T + bias): [..., K] to [..., N]."""
    op = ProductOperands()
    op.second_weights, (op.second_bias,) = up.address, addresses(up.bias)
    return _run(op, x, gate, None)


def _run(op: ProductOperands, x: Tensor, matrix: Matrix, out: Tensor | None) -> Tensor:
    source, inputs, outputs = x.contiguous(), x.shape[-1], matrix.out_features
    out = torch.empty((*x.shape[:-1], outputs)) if out is None else out
    op.weights, (op.x, op.bias, op.out) = matrix.address, addresses(source, matrix.bias, out)
    op.rows, op.inputs, op.units = source.numel() // inputs, inputs, outputs // COLUMNS
    op.stride, op.out_stride = 4 * inputs, 4 * outputs
    launch_shares(_product, op, 2 * COLUMNS)
    return out


def launch_shares(kernel: Kernel[Any], op: Any, width: int) -> None:
    """Launch a kernel that works through `next_share`. width: floats of scratch that it needs for each row."""
    threads, few = torch.get_num_threads(), op.rows <= _FEW_ROWS
    op.shares, op.row_blocks = (threads, 1) if few else (threads * _MANY_SHARES, -(-op.rows // _MANY_ROWS))
    scratch = torch.empty(threads, width * -(-op.rows // op.row_blocks))
    op.scratch, op.scratch_bytes = scratch.data_ptr(), 4 * scratch.stride(0)
    kernel.launch(op, threads)
