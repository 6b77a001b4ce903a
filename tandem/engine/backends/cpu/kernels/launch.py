"""Runs kernels, which are functions that numba compiles, on torch's own OpenMP threads.

torch's workers spin for milliseconds after every operator, so a second pool (numba's, or Python threads) finds its
core busy and a step gets several times slower; numba's `workqueue` pool also aborts when two threads enter it. Here
a kernel is a C function that the OpenMP runtime which torch has loaded calls in each thread of its team
(`GOMP_parallel`, GCC libgomp ABI; libiomp5 exports it too): same threads, no second pool, and as re-entrant as torch.
Where that symbol is not found, kernels run in the calling thread alone.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar, get_type_hints

import numpy as np
import torch
from numba import cfunc, from_dtype, types
from torch import Tensor

from tandem.engine.backends.cpu.kernels.parts import FAST

_C_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

_Class = TypeVar("_Class", bound=type)
_Operands = TypeVar("_Operands")


def slots(count: int, kind: Any = ctypes.c_int64) -> Any:
    """So many operands, for names in a class of `operands`; an int64 may be an address."""
    return [kind] * count


def operands(cls: _Class) -> _Class:
    """A decorator: a class of `slots` becomes the C struct of what all threads of a launch are told; 0 at first.

    Two counters come before its own names: `next_ticket` and `own_scratch`.
    """
    counters = [("tickets", ctypes.c_int64), ("threads", ctypes.c_int64)]
    fields = counters + [(name, kind) for name, kind in vars(cls).items() if not name.startswith("_")]
    # Without a __dict__, another name cannot be set.
    return type(cls.__name__, (ctypes.Structure,), {"__slots__": (), "_fields_": fields})  # type: ignore[return-value]


def addresses(*tensors: Tensor | None) -> list[int]:
    """Where they lie; 0 for one that is not there."""
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


class Kernel(Generic[_Operands]):
    """A decorator: compiles a function of operands, or loads it from numba's cache where one can be written."""

    def __init__(self, function: Callable[[_Operands], None]) -> None:
        struct = next(iter(get_type_hints(function).values()))
        signature = types.void(from_dtype(np.dtype(struct)))  # numba passes a struct by its address
        options = {"fastmath": FAST, "error_model": "numpy"}
        # numba looks for changes in the file that defines a function alone, but a kernel holds code of other files
        # too. What it caches is named after the function, and so after all of them.
        function.__qualname__ += f"_{_digest(Path(inspect.getfile(function)))}"
        try:
            self._compiled = cfunc(signature, cache=True, **options)(function)
        except RuntimeError:  # read-only install and no home to write in: "no locator available"
            self._compiled = cfunc(signature, **options)(function)

    def launch(self, op: _Operands, threads: int) -> None:
        """Call it once in each of `threads` threads (`torch.get_num_threads()`, or 1); returns when all have.

        The caller keeps the memory behind every address alive until this returns. The interpreter lock is released
        meanwhile. The same operands may be launched again.
        """
        address, parallel = ctypes.addressof(op), _openmp_parallel()  # type: ignore[arg-type]
        ctypes.memset(address, 0, 16)  # the counters, as a launch before has left them
        if parallel is None or threads == 1:
            _C_FUNCTION(self._compiled.address)(address)
        else:
            parallel(self._compiled.address, address, threads, 0)


def _digest(file: Path) -> str:
    """Changes with any file whose code the kernels of this one may hold."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(_included(file)))).hexdigest()[:16]


@functools.cache
def _included(file: Path) -> frozenset[Path]:
    """The file itself, and what it imports from this folder, and what that imports."""
    pattern = rf"^from {re.escape(__package__)}\.(\w+) import "
    names = re.findall(pattern, file.read_text(encoding="utf-8"), re.MULTILINE)
    return frozenset({file}).union(*(_included(Path(__file__).with_name(f"{name}.py")) for name in names))


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
