"""The CPU as a backend: float32, numba kernels, weights packed at load."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tandem.engine.backends.backend import Allocate, Attention, Backend
from tandem.engine.backends.cpu import attention
from tandem.engine.backends.cpu.memory import tune_allocator, use_huge_pages
from tandem.engine.batch import AttentionOptions, PagedBatch

# Below this the weights fit into a cache or two, and moving memory takes longer than it saves.
_HUGE_PAGES_FROM_BYTES = 128 << 20


class CpuBackend(Backend):
    name = "cpu"
    dtype = torch.float32
    block_size = 16

    def prepare_process(self) -> None:
        tune_allocator()

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
            return super().empty(shape, dtype, None)
        return torch.frombuffer(allocate(math.prod(shape) * dtype.itemsize), dtype=dtype).view(shape)

    def send(self, *parts: NDArray[np.generic]) -> list[Tensor]:
        """They share the arrays' memory."""
        return [torch.from_numpy(part) for part in parts]

    write_kv = staticmethod(attention.write_kv)

    def plan_attention(self, batch: PagedBatch, options: AttentionOptions) -> Attention:
        return attention.CpuAttention(batch, options)
