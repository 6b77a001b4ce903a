"""The memory of the KV pool."""

from __future__ import annotations

import errno
import math

import torch
from torch import Tensor

from tandem.engine.backends.backend import Allocate, Backend
from tandem.errors import ModelRefused
from tandem.out_of_memory import is_out_of_memory
from tandem.types import KV_DTYPES, Fingerprint

# Version of the layout below; peers with another one are refused. Raise it when the order of axes changes.
LAYOUT_VERSION = 1
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in KV_DTYPES}
# What the kernel says to an `allocate`.
_NO_ROOM = {errno.ENOMEM, errno.ENOSPC}


class KVCache:
    """One tensor [L layers, 2 (K, V), N blocks, P block_size, K kv_heads, D head_dim] on the engine's device.

    A layer's K or V is a contiguous [N, P, K, D] view, which is what paged attention kernels take as pages.
    """

    def __init__(
        self, fingerprint: Fingerprint, num_blocks: int, backend: Backend, allocate: Allocate | None = None
    ) -> None:
        """allocate: where the pool lies if the device computes in the host's memory; None: torch's own memory.

        Raises ModelRefused when the device has no room; any other error of its memory keeps its own words.
        """
        shape = (
            fingerprint.num_layers,
            2,
            num_blocks,
            fingerprint.block_size,
            fingerprint.num_kv_heads,
            fingerprint.head_dim,
        )
        try:
            # Written once here: the page faults of a first touch are ten times slower than later writes.
            self.pool = backend.empty(shape, DTYPES[fingerprint.dtype], allocate).fill_(0)
        except (RuntimeError, MemoryError, OSError) as error:
            if not (is_out_of_memory(error) or getattr(error, "errno", None) in _NO_ROOM):
                raise
            size = f"{math.prod(shape) * DTYPES[fingerprint.dtype].itemsize >> 20} MiB"
            raise ModelRefused(
                f"{backend.name} has no room for a KV pool of {size}: lower engine.kv_memory_mib or engine.num_blocks",
                field="engine.kv_memory_mib",
            ) from None
        self._layers = [(layer[0], layer[1]) for layer in self.pool]

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """K and V of one layer, each [N, P, K, D]."""
        return self._layers[index]


def block_bytes(fingerprint: Fingerprint) -> int:
    """Size of one block: K and V, in all layers."""
    token_elements = 2 * fingerprint.num_layers * fingerprint.num_kv_heads * fingerprint.head_dim
    return token_elements * DTYPES[fingerprint.dtype].itemsize * fingerprint.block_size
