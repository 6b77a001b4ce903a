"""Runs numba kernels on torch's own OpenMP threads.

torch's workers spin for milliseconds after every operator, so a second pool (numba's, or Python threads) finds its
core busy and a step gets several times slower; numba's `workqueue` pool also aborts when two threads enter it. Here
a kernel is a C function that the OpenMP runtime which torch has loaded calls in each thread of its team
(`GOMP_parallel`, GCC libgomp ABI; libiomp5 exports it too): same threads, no second pool, and as re-entrant as torch.
Where that symbol is not found, kernels run in the calling thread alone.
"""

import ctypes
import functools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic

# Words of a launch; the first two are counters that the kernel's threads share, the rest are the kernel's own.
WORDS = 32
# Fused multiply-add and reassociation only: infinities and NaN keep their meaning, a NaN must surface.
FAST = {"nsz", "arcp", "contract", "reassoc"}
_C_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_SIGNATURE = types.void(types.CPointer(types.int64))


class Kernel(Protocol):
    """What `numba.cfunc` returns, as far as we use it: a C function `void f(int64_t *words)`."""

    address: int


@intrinsic  # type: ignore[untyped-decorator]
def pointer(_context: Any, address: Any) -> Any:
    """An integer address as a pointer that `carray` accepts."""

    def codegen(_ctx: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return builder.inttoptr(values[0], ir.IntType(8).as_pointer())

    return types.voidptr(address), codegen


@intrinsic  # type: ignore[untyped-decorator]
def atomic_add(_context: Any, address: Any, amount: Any) -> Any:
    """Adds to the int64 at an address, sequentially consistent; returns the value before."""

    def codegen(_ctx: Any, builder: Any, _signature: Any, values: Any) -> Any:
        target = builder.inttoptr(values[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", target, values[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def float_of_bits(_context: Any, bits: Any) -> Any:
    """The float32 with these int32 bits."""

    def codegen(_ctx: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return builder.bitcast(values[0], ir.FloatType())

    return types.float32(types.int32), codegen


@njit(inline="always", error_model="numpy")  # type: ignore[untyped-decorator]
def floats(address: int, length: int) -> Any:
    """float32 array over raw memory."""
    return carray(pointer(address), (length,), np.float32)


def bits_of_float(value: float) -> int:
    """The bits of a float32, to travel in a word of a launch; `float_of_bits` is the way back."""
    return int(struct.unpack("i", struct.pack("f", value))[0])


def kernel(function: Callable[[Any], None]) -> Kernel:
    """Compile `function(words)` now, or load it from numba's cache where any cache folder can be written.

    numba looks for changes in the file that defines `function` alone: after an edit of helpers in another file
    (`tile`, this one), touch the files of the kernels that use them.
    """
    options = {"fastmath": FAST, "error_model": "numpy"}
    try:
        compiled: Kernel = cfunc(_SIGNATURE, cache=True, **options)(function)
    except RuntimeError:  # read-only install and no home to write in: "no locator available"
        compiled = cfunc(_SIGNATURE, **options)(function)
    return compiled


@functools.cache
def _openmp_parallel() -> Callable[..., None] | None:
    # The process's own scope first: an OpenMP runtime that was preloaded is the one that torch is bound to.
    torch_library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    for name in (None, str(torch_library)):
        try:
            entry = ctypes.CDLL(name).GOMP_parallel
        except (OSError, AttributeError):
            continue
        entry.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        entry.restype = None
        return entry
    return None


def launch(compiled: Kernel, *words: int, threads: int) -> None:
    """Call the kernel once in each of `threads` threads (`torch.get_num_threads()`, or 1); returns when all have.

    The kernel gets `[0, 0, *words]`; its threads share the array. The caller keeps the memory behind every address
    alive until this returns. The interpreter lock is released meanwhile.
    """
    shared = (ctypes.c_int64 * WORDS)(0, 0, *words)
    parallel = _openmp_parallel()
    if parallel is None or threads == 1:
        _C_FUNCTION(compiled.address)(ctypes.addressof(shared))
    else:
        parallel(compiled.address, ctypes.addressof(shared), threads, 0)
