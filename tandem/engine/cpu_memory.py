"""Keeps glibc from handing freed memory back to the kernel, so that an engine's big temporaries cost no page faults.

A step allocates the same activations again and again. By default glibc maps each large one anew and unmaps it on
free, and the kernel clears every page on first touch: 0.6-0.8 GB/s where a warm copy runs at 5 GB/s.
"""

import ctypes
import functools
import logging
import platform

logger = logging.getLogger(__name__)

# malloc.h; mallopt takes int values, so "never" is the largest int.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_LARGEST_INT = 2**31 - 1
# How much the heap grows at a time: few system calls while it warms up, little waste once it is.
_GROWTH_BYTES = 64 << 20


@functools.cache
def tune_allocator() -> bool:
    """Make this process keep freed memory; true where it took effect, false elsewhere than glibc on Linux.

    Call it before the engine's thread starts. New threads share one arena from then on; a thread that already has
    an arena of its own keeps it, and such arenas are built of 64 MiB pieces and map anything larger anew. The price
    is that the process's memory stays at its high-water mark. Later calls change nothing.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = (
        (_M_ARENA_MAX, 1),
        (_M_MMAP_MAX, 0),
        (_M_TRIM_THRESHOLD, _LARGEST_INT),
        (_M_TOP_PAD, _GROWTH_BYTES),
    )
    accepted = [mallopt(option, value) == 1 for option, value in settings]
    logger.debug("glibc keeps freed memory: %s", accepted)
    return all(accepted)
