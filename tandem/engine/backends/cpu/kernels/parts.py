"""What kernels are made of: how their functions are compiled, memory, counters, and arithmetic that several share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import carray, njit, types
from numba.extending import intrinsic, register_jitable

# Fused multiply-add and reassociation only: infinities and NaN keep their meaning, a NaN must surface.
FAST = {"nsz", "arcp", "contract", "reassoc"}

_LOG2E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)

_Function = TypeVar("_Function", bound=Callable[..., Any])

# All are inlined. Of a function that is not, the process that compiles a kernel runs another copy than those that load
# the kernel from the cache; LLVM has optimised it apart, and took sums in another order.
_OPTIONS = {"error_model": "numpy", "forceinline": True}


def jit(function: _Function) -> _Function:
    """A decorator: the kernels that call this function compile it too; its arithmetic is as written."""
    return njit(**_OPTIONS)(function)  # type: ignore[no-any-return]


def fast_jit(function: _Function) -> _Function:
    """The same; it may add in any order, and fuse multiplications with additions."""
    return njit(fastmath=FAST, **_OPTIONS)(function)  # type: ignore[no-any-return]


def python_jit(function: _Function) -> _Function:
    """The same as `jit`; Python may call it, too."""
    return register_jitable(**_OPTIONS)(function)  # type: ignore[no-any-return]


@intrinsic  # type: ignore[untyped-decorator]
def _pointer(_context: Any, address: Any) -> Any:
    """An integer address as a pointer that `carray` accepts."""

    def codegen(_ctx: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return builder.inttoptr(values[0], ir.IntType(8).as_pointer())

    return types.voidptr(address), codegen


@njit(inline="always", error_model="numpy")  # type: ignore[untyped-decorator]
def floats(address: int, length: int) -> Any:
    """float32 array over raw memory."""
    return carray(_pointer(address), (length,), np.float32)


@njit(inline="always", error_model="numpy")  # type: ignore[untyped-decorator]
def int32s(address: int, length: int) -> Any:
    return carray(_pointer(address), (length,), np.int32)


@njit(inline="always", error_model="numpy")  # type: ignore[untyped-decorator]
def int64s(address: int, length: int) -> Any:
    return carray(_pointer(address), (length,), np.int64)


@jit
def copy(source: int, out: int, size: int) -> None:
    """float32; where they overlap they are the same. numba takes seconds to compile `out[:] = source`."""
    x, y = floats(source, size), floats(out, size)
    for i in range(size):
        y[i] = x[i]


@intrinsic  # type: ignore[untyped-decorator]
def _address_of(_context: Any, op: Any) -> Any:
    def codegen(_ctx: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return builder.ptrtoint(values[0], ir.IntType(64))

    return types.int64(op), codegen


@intrinsic  # type: ignore[untyped-decorator]
def count_up(_context: Any, address: Any) -> Any:
    """Adds 1 to the int64 at an address, sequentially consistent; returns the value before."""

    def codegen(_ctx: Any, builder: Any, _signature: Any, values: Any) -> Any:
        target = builder.inttoptr(values[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", target, ir.Constant(ir.IntType(64), 1), "seq_cst")

    return types.int64(types.int64), codegen


@jit
def next_ticket(op: Any) -> Any:
    """How often the threads of a launch have asked before: each number is given once, from 0 on."""
    return count_up(_address_of(op))


@jit
def own_scratch(op: Any) -> Any:
    """The calling thread's memory, of `scratch_bytes`; to be asked once."""
    return op.scratch + op.scratch_bytes * count_up(_address_of(op) + 8)


@jit
def next_rows(op: Any, most: int) -> Any:
    """Rows that no thread has yet: the first, and the one past the last. None is left when they are equal."""
    first = min(next_ticket(op) * most, op.rows)
    return first, min(first + most, op.rows)


@intrinsic  # type: ignore[untyped-decorator]
def _float_of_bits(_context: Any, bits: Any) -> Any:
    """The float32 with these int32 bits."""

    def codegen(_ctx: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return builder.bitcast(values[0], ir.FloatType())

    return types.float32(types.int32), codegen


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
    return p * _float_of_bits(np.int32((n + np.int32(127)) << np.int32(23)))


@fast_jit
def silu_multiply(gate: int, up: int, size: int) -> None:
    """gate = gate * sigmoid(gate) * up."""
    g, u = floats(gate, size), floats(up, size)
    for i in range(size):
        e = exp_nonpositive(-abs(g[i]))
        above = np.float32(1.0) if g[i] >= np.float32(0.0) else e
        g[i] = g[i] * (above / (np.float32(1.0) + e)) * u[i]


@python_jit
def first_key(position: int, window: int, chunk: int) -> int:
    """The same as AttentionOptions.first_key."""
    first = max(position + 1 - window, 0) if window > 0 else 0
    return max(first, position // chunk * chunk) if chunk > 0 else first
