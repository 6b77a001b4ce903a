"""The pool's memory: what is no room is said so, and nothing else is."""

from __future__ import annotations

import errno
import os

import pytest

from tandem.engine.backends.backend import Allocate, backend_for
from tandem.engine.kv_cache import KVCache
from tandem.errors import ModelRefused
from tandem.types import Fingerprint

SMALL = Fingerprint("", "", "float32", block_size=16, num_layers=2, num_kv_heads=2, head_dim=32, layout=1)


def refusing(error: Exception) -> Allocate:
    def allocate(_size: int) -> memoryview:
        raise error

    return allocate


@pytest.mark.parametrize(
    "allocate",
    [
        refusing(MemoryError("more than the machine has")),
        refusing(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))),
        refusing(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
        None,
    ],
)
def test_no_room_is_refused_with_the_settings_to_lower(allocate: Allocate | None) -> None:
    num_blocks = 1 << 44 if allocate is None else 1  # 2**58 bytes, more than any address space
    with pytest.raises(ModelRefused, match=r"cpu has no room for a KV pool of [0-9]+ MiB: lower engine") as caught:
        KVCache(SMALL, num_blocks, backend_for("cpu"), allocate)
    assert caught.value.field == "engine.kv_memory_mib"


def test_what_is_not_want_of_room_keeps_its_own_words() -> None:
    with pytest.raises(PermissionError):
        KVCache(SMALL, 1, backend_for("cpu"), refusing(PermissionError(errno.EACCES, os.strerror(errno.EACCES))))
    with pytest.raises(RuntimeError, match="shape"):
        KVCache(SMALL, 4, backend_for("cpu"), lambda size: memoryview(bytearray(size // 2)))
    with pytest.raises(RuntimeError, match="overflowed"):
        KVCache(SMALL, 1 << 58, backend_for("cpu"))
