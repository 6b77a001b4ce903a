"""The projections of a layer to queries, keys and values, in one pass: fp32.

What `matmul.py` does for many or few rows, and while a head's sums are still in cache they get their bias and are
turned (RoPE, Su et al. 2021, in the half-rotating form of GPT-NeoX and Llama); queries are written as rows,
keys and values go to their slots of the paged KV pool at once.

Importing this module compiles the kernel, or loads it from numba's cache.
"""

from __future__ import annotations

import ctypes

from torch import Tensor

from tandem.engine.backends.cpu.kernels.launch import Kernel, addresses, operands, slots
from tandem.engine.backends.cpu.kernels.matmul import Matrix, add_bias, block_sums, launch_shares, next_share
from tandem.engine.backends.cpu.kernels.parts import copy, fast_jit, floats, int64s, jit, own_scratch
from tandem.engine.backends.cpu.kernels.tile import COLUMNS

# Which of the three.
_QUERY, _VALUE = 0, 2


@operands
class HeadsOperands:
    # stride in bytes; slots_T: int64.
    x, stride, rows, inputs, dim, cos, sin, slots_T = slots(8)
    # For query, key and value. Units are heads, or blocks of columns with several; outs [T, H, D], or pools.
    units_of, weights, biases, outs = slots(4, ctypes.c_int64 * 3)
    # As a product has them; units: of all three.
    units, shares, row_blocks, scratch, scratch_bytes = slots(5)


def dim_fits(dim: int) -> bool:
    """Whether heads lie whole in blocks of 64 columns, or blocks in halves of heads."""
    return dim % 2 == 0 and (COLUMNS % dim == 0 or dim % (2 * COLUMNS) == 0)


@fast_jit
def _turn(first: int, second: int, size: int, cos: int, sin: int, half: int) -> None:
    """(a, b) -> (a cos - b sin, b cos + a sin) in place, for a piece of the halves of a head; `half`: a whole one."""
    a, b, c, s = floats(first, size), floats(second, size), floats(cos, size), floats(sin, size)
    c_second, s_second = floats(cos + 4 * half, size), floats(sin + 4 * half, size)
    for i in range(size):
        before = a[i]
        a[i] = before * c[i] - b[i] * s[i]
        b[i] = b[i] * c_second[i] + before * s_second[i]


@jit
def _turn_row(sums: int, part_bytes: int, parts: int, dim: int, cos: int, sin: int) -> None:
    """All heads of one row: one head in several blocks of columns, or several in one."""
    half = dim // 2
    if parts == 1:
        for head in range(COLUMNS // dim):
            start = sums + 4 * dim * head
            _turn(start, start + 4 * half, half, cos, sin, half)
    for part in range(parts // 2):
        start, offset = sums + part_bytes * part, 4 * COLUMNS * part
        _turn(start, start + part_bytes * (parts // 2), COLUMNS, cos + offset, sin + offset, half)


@jit
def _unit(op: HeadsOperands, unit: int, first_row: int, rows: int, sums: int) -> None:
    """One block of columns, or those of one head, of some rows."""
    stride, inputs, dim, matrix = op.stride, op.inputs, op.dim, _QUERY
    while unit >= op.units_of[matrix]:
        unit -= op.units_of[matrix]
        matrix += 1
    parts, part_bytes = max(dim // COLUMNS, 1), 4 * COLUMNS * rows
    unit_bytes = 4 * COLUMNS * parts
    offset, row_bytes = unit_bytes * unit, unit_bytes * op.units_of[matrix]
    for part in range(parts):
        start, part_sums = offset + 4 * COLUMNS * part, sums + part_bytes * part
        x, weights = op.x + stride * first_row, op.weights[matrix] + start * inputs
        block_sums(x, stride, rows, weights, inputs, part_sums)
        add_bias(part_sums, rows, op.biases[matrix], start)
    for row in range(rows):
        at, row_sums = first_row + row, sums + 4 * COLUMNS * row
        if matrix != _VALUE:
            _turn_row(row_sums, part_bytes, parts, dim, op.cos + 4 * dim * at, op.sin + 4 * dim * at)
        place = at if matrix == _QUERY else int64s(op.slots_T, op.rows)[at]
        target = op.outs[matrix] + row_bytes * place + offset
        for part in range(parts):
            copy(row_sums + part_bytes * part, target + 4 * COLUMNS * part, COLUMNS)


@Kernel
def _heads(op: HeadsOperands) -> None:
    sums = own_scratch(op)
    first, last, unit, end = next_share(op)
    while first < op.rows:
        for each in range(unit, end):
            _unit(op, each, first, last - first, sums)
        first, last, unit, end = next_share(op)


# A projection, and where its heads go; None where it is not wanted.
Target = tuple[Matrix, Tensor] | None


def project_heads(
    x_TxN: Tensor, targets: tuple[Target, Target, Target], cos_TxD: Tensor, sin_TxD: Tensor, slots_T: Tensor
) -> None:
    """Queries to [T, H, D]; keys and values to their tokens' slots of the pools [N, P, K, D]. All contiguous."""
    op = HeadsOperands()
    (op.rows, op.inputs), op.dim = x_TxN.shape, cos_TxD.shape[1]
    op.x, op.cos, op.sin, op.slots_T = addresses(x_TxN, cos_TxD, sin_TxD, slots_T)
    op.stride, width = 4 * op.inputs, max(op.dim, COLUMNS)
    for i, target in enumerate(targets):
        if target is not None:
            matrix, out = target
            op.units_of[i], op.weights[i] = matrix.out_features // width, matrix.address
            op.biases[i], op.outs[i] = addresses(matrix.bias, out)
    op.units = sum(op.units_of)
    launch_shares(_heads, op, width)
