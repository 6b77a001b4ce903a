"""Memory that two processes of one host share: a pool that its owner made, and the same seen by a peer.

It is a sealed memfd. Nobody can shrink it under a reader, it has no name in any file system, and it is gone with the
last process that has it: nothing stays behind a SIGKILL.

A lock on a byte past the memory's end stands for a writer. It is of the open file, not of the process, so two ends in
one process see each other's, and the kernel drops it when the file is closed and unmapped: a process that died has
written its last before its locks are gone.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import mmap
import os
import secrets
import stat
import struct
import sys
import weakref
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tandem.errors import TransferFailed

log = logging.getLogger(__name__)

_SEALS_OF_SIZE = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
# struct flock of 64-bit Linux: type, whence, start, length, pid.
_FLOCK = struct.Struct("@hhqqi4x")
_NAME = "tandem-kv-"
_HUGE_PAGE_BYTES = 2 << 20
_MAP_FIXED = 0x10
_FAILED = ctypes.c_void_p(-1).value


def shared_memory() -> SharedMemory | None:
    """For a pool of this process, where the system has what it takes: Linux of 64 bits."""
    if sys.platform != "linux" or sys.maxsize < 2**32:
        return None
    try:
        host_domain()
        trial = SharedMemory()
        trial.allocate(mmap.PAGESIZE)
        PeerMemory(os.getpid(), trial.fd, trial.id, trial.size).close()
        os.close(trial.fd)
    except (OSError, TransferFailed) as error:
        log.info("this system's processes cannot share memory: %s", error)
        return None
    return SharedMemory()


def host_domain() -> str:
    """Equal in two processes that can open each other's memory: of one boot, one space of process ids, one user."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    spaces = [os.stat(f"/proc/self/ns/{kind}").st_ino for kind in ("pid", "user")]
    return hashlib.sha256(repr((boot, spaces, os.geteuid())).encode()).hexdigest()[:32]


class SharedMemory:
    """The owner's: one allocation, for as long as the process lives."""

    def __init__(self) -> None:
        # 128 random bits, which the memory's name holds: a peer knows it again, whatever process has the pid by then.
        self.id = secrets.token_hex(16)
        self.size = 0
        self.fd = -1
        self._address = 0

    def allocate(self, size: int) -> memoryview:
        """So many bytes, zeroed when they are touched. Raises MemoryError or OSError."""
        assert not self.size, "one pool a process"
        if size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
            raise MemoryError("more than the machine has")  # the kernel says so when it is touched, by ending us
        self.fd = os.memfd_create(_NAME + self.id, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, size)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS_OF_SIZE | fcntl.F_SEAL_SEAL)
        memory = map_aligned(self.fd, size)
        self._address = np.frombuffer(memory, dtype=np.uint8).ctypes.data
        self.size = size
        return memory

    def is_at(self, address: int) -> bool:
        return bool(self.size) and address == self._address

    def locked(self, key: int) -> bool:
        """Whether a writer holds the lock of this key."""
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, self.size + key, 1, 0)
        kind, *_ = _FLOCK.unpack(fcntl.fcntl(self.fd, fcntl.F_OFD_GETLK, asked))
        return bool(kind != fcntl.F_UNLCK)


class PeerMemory:
    """Another process's SharedMemory, mapped."""

    def __init__(self, pid: int, fd: int, memory_id: str, size: int) -> None:
        """Raises TransferFailed when the memory cannot be opened, or is not what it should be."""
        self.size = size
        path = f"/proc/{pid}/fd/{fd}"
        try:
            if os.readlink(path) != f"/memfd:{_NAME}{memory_id} (deleted)":
                raise TransferFailed("the peer's pool is not where it says")
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise TransferFailed(f"the peer's pool cannot be opened: {error.strerror}") from None
        try:
            _check(self._fd, size)
            self._map: memoryview | None = map_aligned(self._fd, size)
        except BaseException:
            os.close(self._fd)
            raise

    @property
    def bytes(self) -> NDArray[np.uint8]:
        """All of it. It stays mapped for as long as somebody has this, whatever is closed."""
        assert self._map is not None
        return np.frombuffer(self._map, dtype=np.uint8)

    def lock(self, key: int) -> None:
        """Raises TransferFailed when another process holds it."""
        try:
            self._set_lock(fcntl.F_WRLCK, key)
        except OSError:
            raise TransferFailed("another writer holds the reservation's blocks") from None

    def unlock(self, key: int) -> None:
        self._set_lock(fcntl.F_UNLCK, key)

    def close(self) -> None:
        """Its locks are gone once it is unmapped too."""
        self._map = None
        os.close(self._fd)

    def _set_lock(self, kind: int, key: int) -> None:
        wanted = _FLOCK.pack(kind, os.SEEK_SET, self.size + key, 1, 0)
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, wanted)


def _check(fd: int, size: int) -> None:
    """Raises TransferFailed unless this is memory of our own user that keeps its size."""
    found = os.fstat(fd)
    sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS_OF_SIZE == _SEALS_OF_SIZE
    if not stat.S_ISREG(found.st_mode) or not sealed or found.st_uid != os.geteuid():
        raise TransferFailed("the peer's pool is no sealed memory of this user")
    if found.st_size != size:
        raise TransferFailed(f"the peer's pool has {found.st_size} bytes where its blocks take {size}")


def map_aligned(fd: int, size: int) -> memoryview:
    """All of a file, shared and writable; unmapped when nothing refers to the result any more. Raises OSError.

    From an address where the kernel can use huge pages, which Python's own mmap lets nobody choose: what reads or
    writes a pool touches blocks here and there, and misses the TLB at each page of 4 KiB.
    """
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
