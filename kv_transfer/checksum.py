"""The checksum of everything that travels: crc32 with zlib's polynomial, by the processor's carry-less product.

In cache it runs at 50 GB/s where zlib's table makes 4 and a copy 5 to 13: beside a copy it costs little.
"""

from __future__ import annotations

from isal import isal_zlib


def crc32(data: bytes | memoryview, start: int = 0) -> int:
    """As zlib.crc32; the interpreter's lock is free meanwhile."""
    return isal_zlib.crc32(data, start)
