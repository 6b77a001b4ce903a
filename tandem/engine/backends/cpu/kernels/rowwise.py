"""numba kernels of what a decoder layer does row by row, each in one pass over memory (fp32): RMSNorm, rotary, SwiGLU.

Importing this module compiles the kernels, or loads them from numba's cache.
"""

from typing import Any

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from tandem.engine.backends.cpu.kernels.decode import exp_nonpositive
from tandem.engine.backends.cpu.kernels.parallel import (
    FAST,
    atomic_add,
    bits_of_float,
    float_of_bits,
    floats,
    kernel,
    launch,
)

# Rows a thread takes at a time; and below so many elements one thread is done before a second has woken up.
_ROWS_A_TICKET = 16
_ELEMENTS_FOR_ONE_THREAD = 1 << 15


@njit(fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def _normalise_row(source: int, weight: int, out: int, size: int, epsilon: Any) -> None:
    x, w, y = floats(source, size), floats(weight, size), floats(out, size)
    total = np.float32(0.0)
    for i in range(size):
        total += x[i] * x[i]
    inverse = np.float32(1.0) / np.float32(np.sqrt(total / np.float32(size) + epsilon))
    for i in range(size):
        y[i] = x[i] * inverse * w[i]


def _rms_norm(words_pointer: Any) -> None:
    """words: 0 ticket, 2 x, 3 weight, 4 out, 5 rows, 6 row size, 7 epsilon."""
    words = carray(words_pointer, (8,))
    rows, size = words[5], words[6]
    while True:
        first = atomic_add(np.int64(words.ctypes.data), 1) * _ROWS_A_TICKET
        if first >= rows:
            return
        for row in range(first, min(first + _ROWS_A_TICKET, rows)):
            offset = 4 * row * size
            _normalise_row(words[2] + offset, words[3], words[4] + offset, size, float_of_bits(np.int32(words[7])))


@njit(fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
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


def _rotary(words_pointer: Any) -> None:
    """words: 0 ticket, 2 tokens, 3 half of head_dim, 4 cos, 5 sin; then for query and again for key:
    source, token stride, head stride, heads, out.
    """
    words = carray(words_pointer, (16,))
    half = words[3]
    while True:
        first = atomic_add(np.int64(words.ctypes.data), 1) * _ROWS_A_TICKET
        if first >= words[2]:
            return
        for t in range(first, min(first + _ROWS_A_TICKET, words[2])):
            cos, sin = words[4] + 8 * half * t, words[5] + 8 * half * t
            for at in (6, 11):
                source, heads = words[at] + 4 * words[at + 1] * t, words[at + 3]
                _rotate(source, words[at + 2], heads, half, cos, sin, words[at + 4] + 8 * half * heads * t)


@njit(fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def silu_multiply(gate: int, up: int, size: int) -> None:
    """gate = gate * sigmoid(gate) * up, for numba code."""
    g, u = floats(gate, size), floats(up, size)
    for i in range(size):
        e = exp_nonpositive(-abs(g[i]))
        above = np.float32(1.0) if g[i] >= np.float32(0.0) else e
        g[i] = g[i] * (above / (np.float32(1.0) + e)) * u[i]


def _silu_product(words_pointer: Any) -> None:
    """words: 0 ticket, 2 gate, 3 up, 4 rows, 5 row size."""
    words = carray(words_pointer, (6,))
    rows, size = words[4], words[5]
    while True:
        first = atomic_add(np.int64(words.ctypes.data), 1) * _ROWS_A_TICKET
        if first >= rows:
            return
        offset = 4 * first * size
        silu_multiply(words[2] + offset, words[3] + offset, (min(first + _ROWS_A_TICKET, rows) - first) * size)


_RMS_NORM = kernel(_rms_norm)
_SILU_PRODUCT = kernel(_silu_product)
_ROTARY = kernel(_rotary)


def _threads_for(elements: int) -> int:
    return 1 if elements < _ELEMENTS_FOR_ONE_THREAD else torch.get_num_threads()


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dimension; fp32. Returns a contiguous tensor."""
    source = x.contiguous()
    out = torch.empty_like(source)
    size = source.shape[-1]
    words = (source.data_ptr(), weight.data_ptr(), out.data_ptr(), source.numel() // size, size)
    launch(_RMS_NORM, *words, bits_of_float(epsilon), threads=_threads_for(source.numel()))
    return out


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The half-rotating form of RoPE (Su et al. 2021, as in GPT-NeoX and Llama) for query and key; fp32.

    `query` and `key` are [1, heads, T, D] with a dense last dimension, `cos` and `sin` contiguous [1, T, D].
    Returns views of the same shapes whose memory is [T, heads, D].
    """
    tokens, dim = query.shape[2:]
    words = [tokens, dim // 2, cos.data_ptr(), sin.data_ptr()]
    outs = []
    for x in (query, key):
        out = torch.empty((1, tokens, x.shape[1], dim), dtype=x.dtype)
        words += [x.data_ptr(), x.stride(2), x.stride(1), x.shape[1], out.data_ptr()]
        outs.append(out.transpose(1, 2))
    launch(_ROTARY, *words, threads=_threads_for(query.numel()))
    return outs[0], outs[1]


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, written to `gate`; both contiguous, fp32 and of one shape."""
    size = gate.shape[-1]
    words = (gate.data_ptr(), up.data_ptr(), gate.numel() // size, size)
    launch(_SILU_PRODUCT, *words, threads=_threads_for(gate.numel()))
    return gate
