"""The memory of the KV pool."""

from __future__ import annotations

import errno
import math
from collections.abc import Callable

import torch
from torch import Tensor

from tandem.config import MOST_BLOCKS, EngineConfig
from tandem.errors import ConfigError, ModelRefused
from tandem.out_of_memory import is_out_of_memory
from tandem.types import Fingerprint

# Version of the layout below; peers with another one are refused. Raise it when the order of axes changes.
LAYOUT_VERSION = 1
# So many bytes of memory for a pool, for as long as the buffer lives. Raises MemoryError or OSError.
Allocate = Callable[[int], memoryview]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# What the kernel says to an `allocate`.
_NO_ROOM = {errno.ENOMEM, errno.ENOSPC}


class KVCache:
    """One tensor [L layers, 2 (K, V), N blocks, P block_size, K kv_heads, D head_dim] on the engine's device.

    A layer's K or V is a contiguous [N, P, K, D] view, which is what paged attention kernels take as pages.
    """

    def __init__(
        self, fingerprint: Fingerprint, num_blocks: int, device: str, allocate: Allocate | None = None
    ) -> None:
        """allocate: where the pool lies if the device is cpu; None: torch's own memory.

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
            self.pool = _empty(shape, DTYPES[fingerprint.dtype], device, allocate).fill_(0)
        except (RuntimeError, MemoryError, OSError) as error:
            if not (is_out_of_memory(error) or getattr(error, "errno", None) in _NO_ROOM):
                raise
            mib = math.prod(shape) * DTYPES[fingerprint.dtype].itemsize >> 20
            raise ModelRefused(
                f"{device} has no room for a KV pool of {mib} MiB: lower engine.kv_memory_mib or engine.num_blocks",
                field="engine.kv_memory_mib",
            ) from None
        self._layers = [(layer[0], layer[1]) for layer in self.pool]

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """K and V of one layer, each [N, P, K, D]."""
        return self._layers[index]


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: str, allocate: Allocate | None) -> Tensor:
    if allocate is None or device != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.frombuffer(allocate(math.prod(shape) * dtype.itemsize), dtype=dtype).view(shape)


def block_bytes(fingerprint: Fingerprint) -> int:
    """K and V of one block, in all layers."""
    token_elements = 2 * fingerprint.num_layers * fingerprint.num_kv_heads * fingerprint.head_dim
    return token_elements * DTYPES[fingerprint.dtype].itemsize * fingerprint.block_size


def count_blocks(
    config: EngineConfig, fingerprint: Fingerprint, least_tokens: int, left: Callable[[], int] = lambda: 0
) -> int:
    """Blocks in the pool. `left` finds for how many the device has room, where the configuration leaves that open.

    Raises ConfigError when they do not hold the KV of least_tokens.
    """
    least = -(-least_tokens // fingerprint.block_size)
    if config.num_blocks:
        if config.num_blocks < least:
            raise ConfigError(
                f"engine.num_blocks must be {least} or more, not {config.num_blocks}: the check of the model at load "
                f"takes {least_tokens} tokens, a block holds {fingerprint.block_size}",
                field="engine.num_blocks",
            )
        return config.num_blocks
    bytes_each = block_bytes(fingerprint)
    mib = -(-least * bytes_each >> 20)
    if not config.kv_memory_mib:
        blocks = min(left(), MOST_BLOCKS)
        if blocks < least:
            raise ConfigError(
                f"the GPU has room for {blocks} KV blocks of {bytes_each} bytes beside the model and its largest step, "
                f"and the check of the model at load takes {least}: lower engine.max_step_tokens or engine.max_running",
                field="engine.max_step_tokens",
            )
        return blocks
    blocks = (config.kv_memory_mib << 20) // bytes_each
    if blocks < least:
        raise ConfigError(
            f"engine.kv_memory_mib must be {mib} or more, not {config.kv_memory_mib}: the check of the model at load "
            f"takes {least_tokens} tokens, a KV block of {fingerprint.block_size} takes {bytes_each} bytes",
            field="engine.kv_memory_mib",
        )
    return blocks
