"""The projections of a layer to queries, keys and values, in one pass: fp32.

What `matmul` does for many or few rows, and while a head's sums are still in cache they get their bias and are
turned (RoPE, Su et al. 2021, in the half-rotating form of GPT-NeoX and Llama); queries are written as rows,
keys and values go to their slots of the paged KV pool at once.

Importing this module compiles the kernel, or loads it from numba's cache.
"""

from typing import Any

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from tandem.engine.backends.cpu.kernels.matmul import add_bias, address, block_sums, split, work_item
from tandem.engine.backends.cpu.kernels.parallel import FAST, atomic_add, floats, kernel, launch, pointer
from tandem.engine.backends.cpu.kernels.tile import COLUMNS
from tandem.engine.backends.cpu.modules import PackedLinear

# Where the words of the three matrices start in a launch.
_QUERY, _KEY, _VALUE = 15, 19, 23


def dim_fits(dim: int) -> bool:
    """Whether heads lie whole in blocks of 64 columns, or blocks in halves of heads."""
    return dim % 2 == 0 and (COLUMNS % dim == 0 or dim % (2 * COLUMNS) == 0)


@njit(fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def _turn(first: int, second: int, size: int, cos: int, sin: int, half: int) -> None:
    """(a, b) -> (a cos - b sin, b cos + a sin) in place, for a piece of the halves of a head."""
    a, b, c, s = floats(first, size), floats(second, size), floats(cos, size), floats(sin, size)
    c_second, s_second = floats(cos + 4 * half, size), floats(sin + 4 * half, size)
    for i in range(size):
        before = a[i]
        a[i] = before * c[i] - b[i] * s[i]
        b[i] = b[i] * c_second[i] + before * s_second[i]


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
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


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _place(words: Any, matrix: int, row: int) -> int:
    """Where the heads of a row are to lie."""
    slot = np.int64(row)
    if matrix != _QUERY:
        slot = carray(pointer(words[9]), (words[4],), np.int64)[row]
    place: int = words[matrix + 3] + 4 * max(words[6], COLUMNS) * words[matrix] * slot
    return place


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _unit(words: Any, unit: int, first_row: int, rows: int, sums: int) -> None:
    """One block of columns, or those of one head, of some rows."""
    stride, inputs, dim, matrix = words[3], words[5], words[6], _QUERY
    while unit >= words[matrix]:
        unit -= words[matrix]
        matrix += _KEY - _QUERY
    parts, part_bytes = max(dim // COLUMNS, 1), 4 * COLUMNS * rows
    offset = 4 * COLUMNS * parts * unit
    x = words[2] + stride * first_row
    for part in range(parts):
        start, part_sums = offset + 4 * COLUMNS * part, sums + part_bytes * part
        block_sums(x, stride, rows, words[matrix + 1] + start * inputs, inputs, part_sums)
        add_bias(part_sums, rows, words[matrix + 2] + start if words[matrix + 2] != 0 else 0)
    for row in range(rows):
        at, row_sums = first_row + row, sums + 4 * COLUMNS * row
        if matrix != _VALUE:
            _turn_row(row_sums, part_bytes, parts, dim, words[7] + 4 * dim * at, words[8] + 4 * dim * at)
        target = _place(words, matrix, at) + offset
        for part in range(parts):
            floats(target + 4 * COLUMNS * part, COLUMNS)[:] = floats(row_sums + part_bytes * part, COLUMNS)


def _heads(words_pointer: Any) -> None:
    """words: 0 ticket, 1 thread ticket, 2 x, 3 its row stride in bytes, 4 rows, 5 inputs, 6 head_dim, 7 cos, 8 sin,
    9 slots, 10 shares of the columns, 11 row blocks, 12 scratch, 13 its bytes for a thread, 14 units; then for query,
    key and value: units, weights, bias, out.
    """
    words = carray(words_pointer, (27,))
    shared, rows = np.int64(words.ctypes.data), words[4]
    sums = words[12] + words[13] * atomic_add(shared + 8, 1)
    while True:
        item = atomic_add(shared, 1)
        first, last, unit, end = work_item(item, rows, words[14], words[10], words[11])
        if first == rows:
            return
        while unit < end:
            _unit(words, unit, first, last - first, sums)
            unit += 1


_HEADS = kernel(_heads)


# A projection, and where its heads go; None where it is not wanted.
Target = tuple[PackedLinear, Tensor] | None


def project_heads(
    x_TxN: Tensor, targets: tuple[Target, Target, Target], cos_TxD: Tensor, sin_TxD: Tensor, slots_T: Tensor
) -> None:
    """Queries to [T, H, D]; keys and values to their tokens' slots of the pools [N, P, K, D]. All contiguous."""
    (rows, inputs), dim, threads = x_TxN.shape, cos_TxD.shape[1], torch.get_num_threads()
    shares, row_blocks = split(rows, threads)
    width = max(dim, COLUMNS)
    scratch = torch.empty(threads, width * -(-rows // row_blocks))
    matrices = [_words(target, width) for target in targets]
    launch(
        _HEADS,
        *(x_TxN.data_ptr(), 4 * inputs, rows, inputs, dim, cos_TxD.data_ptr(), sin_TxD.data_ptr(), slots_T.data_ptr()),
        *(shares, row_blocks, scratch.data_ptr(), 4 * scratch.stride(0), sum(matrix[0] for matrix in matrices)),
        *(word for matrix in matrices for word in matrix),
        threads=threads,
    )


def _words(target: Target, width: int) -> tuple[int, int, int, int]:
    if target is None:
        return 0, 0, 0, 0
    linear, out = target
    return linear.out_features // width, linear.address, address(linear.bias), out.data_ptr()
