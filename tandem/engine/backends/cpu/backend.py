"""The CPU as a backend: float32, numba kernels, weights packed at load."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tandem.engine.backends.backend import Allocate, Attention
from tandem.engine.backends.cpu import attention
from tandem.engine.backends.cpu.memory import tune_allocator, use_huge_pages
from tandem.engine.batch import AttentionOptions, PagedBatch
from tandem.types import Fingerprint

# Below this the weights fit into a cache or two, and moving memory takes longer than it saves.
_HUGE_PAGES_FROM_BYTES = 128 << 20


class CpuBackend:
    name = "cpu"
    dtype = torch.float32
    block_size = 16

    def prepare_process(self) -> None:
        tune_allocator()

    def require_device(self) -> None:
        pass

    def prepare_model(self, model: nn.Module) -> None:
        # Imported late: that compiles the kernels, and not every process that has the backend loads a model.
        from tandem.engine.backends.cpu.fusion import fuse_for_cpu

        fuse_for_cpu(model)

    def restore_layers(self, model: nn.Module) -> bool:
        from tandem.engine.backends.cpu.fusion import unfuse_layers

        return unfuse_layers(model) > 0

    def settle(self, weights_bytes: int) -> None:
        if weights_bytes >= _HUGE_PAGES_FROM_BYTES:
            use_huge_pages()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, allocate: Allocate | None) -> Tensor:
        if allocate is None:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(allocate(math.prod(shape) * dtype.itemsize), dtype=dtype).view(shape)

    def peak_bytes(self, run: Callable[[], object]) -> int:
        raise NotImplementedError("on cpu engine.kv_memory_mib is 1 or more")

    def bytes_left(self, peak: int) -> int:
        raise NotImplementedError("on cpu engine.kv_memory_mib is 1 or more")

    def attention_obstacles(self, fingerprint: Fingerprint, options: set[AttentionOptions]) -> set[str]:
        return set()

    def send(self, *parts: NDArray[np.generic]) -> list[Tensor]:
        """They share the arrays' memory."""
        return [torch.from_numpy(part) for part in parts]

    write_kv = staticmethod(attention.write_kv)

    def plan_attention(self, batch: PagedBatch, options: AttentionOptions) -> Attention:
        return attention.CpuAttention(batch, options)

    def why_lost(self) -> str:
        return ""

    def free_memory(self) -> None:
        pass
