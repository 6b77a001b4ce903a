"""What a decoder layer does row by row, each in one pass over memory (fp32): RMSNorm, rotary, SwiGLU.

Importing this module compiles the kernels, or loads them from numba's cache.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tandem.engine.backends.cpu.kernels.launch import Kernel, addresses, operands, slots
from tandem.engine.backends.cpu.kernels.parts import fast_jit, floats, next_rows, silu_multiply

# Rows a thread takes at a time; and below so many elements one thread is done before a second has woken up.
_ROWS_A_TICKET = 16
_ELEMENTS_FOR_ONE_THREAD = 1 << 15


@operands
class NormOperands:
    x, weight, out, rows, size = slots(5)
    (epsilon,) = slots(1, ctypes.c_float)


@fast_jit
def _normalise_row(source: int, weight: int, out: int, size: int, epsilon: Any) -> None:
    x, w, y = floats(source, size), floats(weight, size), floats(out, size)
    total = np.float32(0.0)
    for i in range(size):
        total += x[i] * x[i]
    inverse = np.float32(1.0) / np.float32(np.sqrt(total / np.float32(size) + epsilon))
    for i in range(size):
        y[i] = x[i] * inverse * w[i]


@Kernel
def _rms_norm(op: NormOperands) -> None:
    first, last = next_rows(op, _ROWS_A_TICKET)
    while first < last:
        for row in range(first, last):
            offset = 4 * row * op.size
            _normalise_row(op.x + offset, op.weight, op.out + offset, op.size, op.epsilon)
        first, last = next_rows(op, _ROWS_A_TICKET)


@operands
class RotaryOperands:
    rows, half, cos, sin = slots(4)
    # Query's and key's. Strides of a token and of a head in floats.
    sources, row_strides, head_strides, heads, outs = slots(5, ctypes.c_int64 * 2)


@fast_jit
def _rotate(source: int, head_stride: int, heads: int, half: int, cos: int, sin: int, out: int) -> None:
    """All heads of one token: (a, b) -> (a cos - b sin, b cos + a sin), a and b the halves of a head."""
    c, s = floats(cos, 2 * half), floats(sin, 2 * half)
    for h in range(heads):
        a, b = floats(source + 4 * head_stride * h, half), floats(source + 4 * (head_stride * h + half), half)
        y = floats(out + 8 * half * h, 2 * half)
        for i in range(half):
            y[i] = a[i] * c[i] - b[i] * s[i]
        for i in range(half):
            y[half + i] = b[i] * c[half + i] + a[i] * s[half + i]


@Kernel
def _rotary(op: RotaryOperands) -> None:
    half = op.half
    first, last = next_rows(op, _ROWS_A_TICKET)
    while first < last:
        for row in range(first, last):
            cos, sin = op.cos + 8 * half * row, op.sin + 8 * half * row
            for i in range(2):
                heads, source = op.heads[i], op.sources[i] + 4 * op.row_strides[i] * row
                _rotate(source, op.head_strides[i], heads, half, cos, sin, op.outs[i] + 8 * half * heads * row)
        first, last = next_rows(op, _ROWS_A_TICKET)


@operands
class SiluOperands:
    gate, up, rows, size = slots(4)


@Kernel
def _silu_product(op: SiluOperands) -> None:
    size = op.size
    first, last = next_rows(op, _ROWS_A_TICKET)
    while first < last:
        offset = 4 * first * size
        silu_multiply(op.gate + offset, op.up + offset, (last - first) * size)
        first, last = next_rows(op, _ROWS_A_TICKET)


def _threads_for(elements: int) -> int:
    return 1 if elements < _ELEMENTS_FOR_ONE_THREAD else torch.get_num_threads()


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dimension; fp32. Returns a contiguous tensor."""
    source = x.contiguous()
    out = torch.empty_like(source)
    op = NormOperands()
    op.x, op.weight, op.out = addresses(source, weight, out)
    op.size, op.epsilon = source.shape[-1], epsilon
    op.rows = source.numel() // op.size
    _rms_norm.launch(op, _threads_for(source.numel()))
    return out


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The half-rotating form of RoPE (Su et al. 2021, as in GPT-NeoX and Llama) for query and key; fp32.

    `query` and `key` are [1, heads, T, D] with a dense last dimension, `cos` and `sin` contiguous [1, T, D].
    Returns views of the same shapes whose memory is [T, heads, D].
    """
    rows, dim = query.shape[2:]
    both = (query, key)
    outs = [torch.empty((1, rows, x.shape[1], dim)) for x in both]
    op = RotaryOperands()
    op.rows, op.half, (op.cos, op.sin) = rows, dim // 2, addresses(cos, sin)
    op.sources, op.outs = tuple(addresses(*both)), tuple(addresses(*outs))
    op.row_strides, op.head_strides = tuple(x.stride(2) for x in both), tuple(x.stride(1) for x in both)
    op.heads = query.shape[1], key.shape[1]
    _rotary.launch(op, _threads_for(query.numel()))
    return outs[0].transpose(1, 2), outs[1].transpose(1, 2)


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, written to `gate`; both contiguous, fp32 and of one shape."""
    op = SiluOperands()
    op.gate, op.up = addresses(gate, up)
    op.size = gate.shape[-1]
    op.rows = gate.numel() // op.size
    _silu_product.launch(op, _threads_for(gate.numel()))
    return gate
