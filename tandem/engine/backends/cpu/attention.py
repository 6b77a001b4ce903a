"""Attention over the paged KV pool on CPU: numba kernels in fp32 (decode rows; prefill chunks where there is AVX-512),
torch for the rest. The kernels' modules are imported late: importing is compiling (4 s, or 0.5 s from numba's cache).

A kernel's result for a row depends on that row and its own context only (bitwise): not on the batch, on where a prompt
was cut, or on the threads.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tandem.engine.backends import torch_attention
from tandem.engine.backends.torch_attention import TorchAttention
from tandem.engine.batch import PagedBatch

if TYPE_CHECKING:
    from tandem.engine.backends.cpu.kernels.decode import DecodePlan
    from tandem.engine.backends.cpu.kernels.prefill import ChunkPlan


def write_kv(
    key_TxKxD: Tensor, value_TxKxD: Tensor, k_pool_NxPxKxD: Tensor, v_pool_NxPxKxD: Tensor, batch: PagedBatch
) -> None:
    """Put the step's keys and values into their slots of the pool (in place; the pools are contiguous)."""
    if all(map(_kernel_reads, (key_TxKxD[0], value_TxKxD[0], k_pool_NxPxKxD, v_pool_NxPxKxD))):
        from tandem.engine.backends.cpu.kernels.decode import store_rows

        store_rows(key_TxKxD, value_TxKxD, k_pool_NxPxKxD, v_pool_NxPxKxD, batch.slots_T)
    else:
        torch_attention.write_kv(key_TxKxD, value_TxKxD, k_pool_NxPxKxD, v_pool_NxPxKxD, batch)


class CpuAttention(TorchAttention):
    """One step's attention, for layers that ask for the same, by kernels where they take the tensors."""

    def __call__(self, query_TxHxD: Tensor, key: Tensor, value: Tensor, k_pool: Tensor, v_pool: Tensor) -> Tensor:
        if query_TxHxD.dtype == torch.float32 and _kernel_reads(k_pool) and _kernel_reads(v_pool):
            from tandem.engine.backends.cpu.kernels.tile import registers_suffice

            if query_TxHxD.stride(2) == 1 and registers_suffice():
                return self.over_pools(query_TxHxD, k_pool, v_pool)
        return super().__call__(query_TxHxD, key, value, k_pool, v_pool)

    def over_pools(self, query_TxHxD: Tensor, k_pool: Tensor, v_pool: Tensor) -> Tensor:
        """The same by kernels alone, which read keys and values in the pool: fp32, where there is AVX-512."""
        out_TxHxD = torch.empty(query_TxHxD.shape)
        if self.batch.num_decodes:
            self._decodes.run(query_TxHxD, k_pool, v_pool, out_TxHxD)
        for chunk in self._chunks:
            chunk.run(query_TxHxD, k_pool, v_pool, out_TxHxD)
        return out_TxHxD

    def decode(self, query_TxHxD: Tensor, k_pool: Tensor, v_pool: Tensor, out_TxHxD: Tensor) -> None:
        if _kernel_reads(k_pool) and _kernel_reads(v_pool) and query_TxHxD.dtype == torch.float32:
            self._decodes.run(query_TxHxD, k_pool, v_pool, out_TxHxD)
        else:
            super().decode(query_TxHxD, k_pool, v_pool, out_TxHxD)

    @cached_property
    def _decodes(self) -> DecodePlan:
        from tandem.engine.backends.cpu.kernels.decode import DecodePlan

        return DecodePlan(self.batch, self.options)

    @cached_property
    def _chunks(self) -> list[ChunkPlan]:
        from tandem.engine.backends.cpu.kernels.prefill import ChunkPlan

        sequences = range(self.batch.num_decodes, len(self.batch.context_lens))
        return [ChunkPlan(self.batch, sequence, self.options) for sequence in sequences]


def _kernel_reads(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.is_contiguous()
