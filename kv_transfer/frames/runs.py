"""Copies and checksums over memory that lies in pieces: one call for a whole payload, without the interpreter's lock.

A payload of a few MiB is a hundred pieces of a pool, each of which is copied in microseconds. Done piece by piece from
Python, threads spend more time on handing the lock to each other, to the event loop and to the engine than on copying.

Importing this module compiles the loops, or loads them from numba's cache, and calls each once: numba's first call
takes 10 ms.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import llvmlite.binding as llvm  # type: ignore[import-untyped]
import numpy as np
from isal import isal_zlib
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

_F = TypeVar("_F", bound=Callable[..., Any])
_Numbers = NDArray[np.int64]

# ISA-L's, which isal_zlib is made of, by the processor's carry-less product. In cache it runs at 50 GB/s where zlib's
# table makes 4 and a copy 5 to 13: beside a copy it costs little.
_CRC32 = "crc32_gzip_refl"
llvm.add_symbol(_CRC32, ctypes.cast(getattr(ctypes.CDLL(isal_zlib.__file__), _CRC32), ctypes.c_void_p).value)
_crc32 = types.ExternalFunction(_CRC32, types.uint32(types.uint32, types.intp, types.uint64))
_memcpy = types.ExternalFunction("memcpy", types.intp(types.intp, types.intp, types.uint64))
# Bytes that a processor's cache takes at once.
_LINE = 64
# What is copied and then checked fits into the cache next to the core.
_STEP = 32 << 10
_new_bytes = ctypes.pythonapi.PyBytes_FromStringAndSize
_new_bytes.restype, _new_bytes.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_ssize_t]


def crc32(data: bytes | memoryview, start: int = 0) -> int:
    """The checksum of everything that travels, as zlib.crc32; the interpreter's lock is free meanwhile."""
    return isal_zlib.crc32(data, start)


def _compiled(signature: str, nogil: bool = True) -> Callable[[_F], _F]:
    def compile_now(function: _F) -> _F:
        try:
            return njit(signature, nogil=nogil, cache=True)(function)  # type: ignore[no-any-return]
        except RuntimeError:  # read-only install and no home to write in: "no locator available"
            return njit(signature, nogil=nogil)(function)  # type: ignore[no-any-return]

    return compile_now


@_compiled("uint32(int64[::1], int64[::1])")
def _checksum(addresses: _Numbers, sizes: _Numbers) -> Any:
    crc = np.uint32(0)
    for piece in range(len(sizes)):
        crc = _crc32(crc, addresses[piece], sizes[piece])
    return crc


@intrinsic  # type: ignore[untyped-decorator]
def _stream_line(_context: Any, target: Any, source: Any) -> Any:
    """Copies 64 bytes past the caches; the target's address is a multiple of 64."""

    def codegen(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        line = ir.VectorType(ir.IntType(64), 8)
        to, of = (builder.inttoptr(address, line.as_pointer()) for address in values)
        store = builder.store(builder.load(of, align=1), to, align=_LINE)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def _fence(_context: Any) -> Any:
    """What was streamed is seen by others before whatever is written after."""

    def codegen(context: Any, builder: Any, _signature: Any, _values: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@njit  # type: ignore[untyped-decorator]
def _stream(target: int, source: int, size: int) -> None:
    before = min(-target % _LINE, size)
    _memcpy(target, source, before)
    end = size - (size - before) % (4 * _LINE)
    for at in range(before, end, 4 * _LINE):
        for line in range(at, at + 4 * _LINE, _LINE):
            _stream_line(target + line, source + line)
    _memcpy(target + end, source + end, size - end)


@_compiled("uint32(int64[::1], int64[::1], int64[::1], int64[::1], boolean, boolean)")
def _copy(sources: _Numbers, sizes: _Numbers, targets: _Numbers, rooms: _Numbers, checked: bool, streamed: bool) -> Any:
    """Pieces of one division to those of another, of as many bytes in all; returns their crc32, or 0."""
    crc, into, taken = np.uint32(0), 0, 0
    for piece in range(len(sizes)):
        source, left = sources[piece], sizes[piece]
        while left > 0:
            count = min(left, rooms[into] - taken, _STEP)
            if streamed:
                _stream(targets[into] + taken, source, count)
            else:
                _memcpy(targets[into] + taken, source, count)
            if checked:  # while it is in the processor's cache
                crc = _crc32(crc, source, count)
            source, left, taken = source + count, left - count, taken + count
            if taken == rooms[into]:
                into, taken = into + 1, 0
    _fence()
    return crc


@_compiled("boolean(int64[::1], int64, int64, int64, int64, int64, int64, int64[::1], int64[::1])", nogil=False)
def _lay_out(
    blocks: _Numbers,
    most: int,
    address: int,
    plane_bytes: int,
    block_bytes: int,
    before: int,
    after: int,
    addresses: _Numbers,
    sizes: _Numbers,
) -> Any:
    """The pieces of these blocks in each plane of `most` blocks; False for a block that a plane does not have."""
    count = len(blocks)
    for at in range(count):
        if not 0 <= blocks[at] < most:
            return False
    for piece in range(len(sizes)):
        at = piece % count
        first = before if at == 0 else 0
        last = after if at == count - 1 else 0
        addresses[piece] = address + piece // count * plane_bytes + blocks[at] * block_bytes + first
        sizes[piece] = block_bytes - first - last
    return True


@dataclass(frozen=True)
class Planes:
    """The memory of a pool [L, 2, N, ...] on cpu: for each layer, K of all blocks, then V."""

    # Keeps the memory.
    owner: object
    address: int
    layers: int
    blocks: int
    block_bytes: int


class Runs:
    """Where a payload lies: contiguous pieces, in its order. The memory lives as long as this does.

    Its methods take as long as memory does, and run beside others' Python.
    """

    def __init__(self, owner: object, addresses: _Numbers, sizes: _Numbers, nbytes: int) -> None:
        """owner: keeps all of the memory. nbytes: of all pieces."""
        self._owner = owner
        self.addresses = addresses
        self.sizes = sizes
        self.nbytes = nbytes

    @classmethod
    def of(cls, *parts: bytes | memoryview | NDArray[Any]) -> Runs:
        """Each part is contiguous."""
        arrays = [np.frombuffer(part, dtype=np.uint8) for part in parts if len(part)]
        sizes = [array.nbytes for array in arrays]
        addresses = np.array([array.ctypes.data for array in arrays], np.int64)
        return cls(arrays, addresses, np.array(sizes, np.int64), sum(sizes))

    @classmethod
    def of_blocks(cls, planes: Planes, blocks: Sequence[int], layers: range, before: int, after: int) -> Runs:
        """K and V of these blocks in each layer, but for so many bytes of the first one and of the last.

        Raises IndexError for what the planes do not have: what is done to the memory is not checked again.
        """
        if not 0 <= layers.start < layers.stop <= planes.layers:
            raise IndexError("KV layers outside of the pool")
        count = 2 * len(layers) * len(blocks)
        addresses, sizes = np.empty(count, np.int64), np.empty(count, np.int64)
        plane_bytes = planes.blocks * planes.block_bytes
        first = planes.address + 2 * layers.start * plane_bytes
        cells = (plane_bytes, planes.block_bytes, before, after)
        if not _lay_out(np.array(blocks, np.int64), planes.blocks, first, *cells, addresses, sizes):
            raise IndexError("KV blocks outside of the pool")
        nbytes = 2 * len(layers) * (len(blocks) * planes.block_bytes - before - after)
        return cls(planes.owner, addresses, sizes, nbytes)

    def checksum(self) -> int:
        """crc32 of the payload."""
        return int(_checksum(self.addresses, self.sizes))

    def copy_to(self, target: Runs, checked: bool = False, streamed: bool = False) -> int:
        """Returns the crc32 of what was copied, if it is `checked`: in the same pass.

        streamed: into memory that nobody reads soon, a pool: past the caches, for they would read it before it is
        written.
        """
        if self.nbytes != target.nbytes:
            raise ValueError(f"{self.nbytes} bytes do not fill {target.nbytes}")
        return int(_copy(self.addresses, self.sizes, target.addresses, target.sizes, checked, streamed))

    def gathered(self) -> tuple[bytes, int]:
        """The payload in one piece, and its crc32: read once."""
        return self.after(0, lambda crc: b"")

    def after(self, room: int, head: Callable[[int], bytes]) -> tuple[bytes, int]:
        """As gathered, behind the head of a payload with this crc32, which is `room` bytes long."""
        whole: bytes = _new_bytes(None, room + self.nbytes)  # not filled yet, and nobody else's
        memory = memoryview(whole)
        crc = self.copy_to(Runs.of(memory[room:]), checked=True)
        Runs.of(head(crc)).copy_to(Runs.of(memory[:room]))
        return whole, crc


Runs.of(bytes(_LINE)).gathered()
Runs.of(bytes(_LINE)).checksum()
Runs.of_blocks(Planes(None, 0, 1, 1, _LINE), [0], range(1), 0, 0)
