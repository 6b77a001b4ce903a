"""A file mapped from an address where the kernel can use huge pages: Python's own mmap lets nobody choose one.

What reads or writes a pool touches blocks here and there, and misses the TLB at each page of 4 KiB.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref

_HUGE_PAGE_BYTES = 2 << 20
_MAP_FIXED = 0x10
_FAILED = ctypes.c_void_p(-1).value


def map_aligned(fd: int, size: int) -> memoryview:
    """All of a file, shared and writable; unmapped when nothing refers to the result any more. Raises OSError."""
    reserved = size + _HUGE_PAGE_BYTES
    base = _map(None, reserved, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    address = -(-base // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
    try:
        _map(address, size, mmap.MAP_SHARED | _MAP_FIXED, fd, mmap.PROT_READ | mmap.PROT_WRITE)
    except OSError:
        _unmap(base, reserved)
        raise
    area = (ctypes.c_ubyte * size).from_address(address)
    # Not at exit: threads may still run, and the kernel does it then.
    weakref.finalize(area, _unmap, base, reserved).atexit = False
    return memoryview(area).cast("B")


def _map(address: int | None, size: int, flags: int, fd: int, access: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    mapped: int = libc.mmap(address, size, access, flags, fd, 0)
    if mapped == _FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return mapped


def _unmap(address: int, size: int) -> None:
    libc = ctypes.CDLL(None)
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.munmap(address, size)
