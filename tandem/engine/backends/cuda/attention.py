"""Attention over the paged KV pool on CUDA.

    pages      flash attention reads the pages in place: one kernel launch for all rows of a step
    gathered   where it does not take these pages, or none at all, they are copied together first
    torch      where it does not take the numbers: sequence by sequence, with SDPA or by the textbook; slow

Which one a layer gets is a function of the model, the GPU and the torch at hand alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from tandem.engine.backends.torch_attention import TorchAttention
from tandem.engine.batch import AttentionOptions, PagedBatch

# Limits of flash attention 2, which stock torch brings.
PAGE_MULTIPLE, HEAD_DIM_MULTIPLE, LARGEST_HEAD_DIM, LEAST_CAPABILITY = 256, 8, 256, (8, 0)
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class FlashFeatures:
    """What the `varlen_attn` of the torch at hand takes."""

    # From torch 2.11 on.
    window: bool
    # From torch 2.12 on: pages, and fewer key heads than query heads (before, it was not asked about those).
    pages: bool
    gqa: bool
    # Torch 2.12 has the argument and takes it with flash attention 3 only.
    splits: bool

    @classmethod
    def of(cls, function: Callable[..., Any], version: str) -> Self:
        takes = set(inspect.signature(function).parameters)
        major, minor = (int(part) for part in version.split(".")[:2])
        return cls(
            window="window_size" in takes,
            pages={"block_table", "seqused_k"} <= takes,
            gqa="enable_gqa" in takes,
            splits="num_splits" in takes and (major, minor) >= (2, 13),
        )


FLASH = FlashFeatures.of(varlen_attn, torch.__version__)


class CudaAttention(TorchAttention):
    """One step's attention, for layers that ask for the same, by flash attention where it takes the tensors."""

    def __init__(self, batch: PagedBatch, options: AttentionOptions) -> None:
        super().__init__(batch, options)
        self._asked: dict[str, Any] = {"scale": options.scale, "window_size": self._window()}
        if FLASH.splits:
            # One: the order of summation, and so the result, does not depend on the batch.
            self._asked["num_splits"] = 1

    def __call__(self, query_TxHxD: Tensor, key: Tensor, value: Tensor, k_pool: Tensor, v_pool: Tensor) -> Tensor:
        batch, asked = self.batch, dict(self._asked)
        if why_not_flash(query_TxHxD.dtype, query_TxHxD.shape[2], self.options, _capability(query_TxHxD.device)):
            return super().__call__(query_TxHxD, key, value, k_pool, v_pool)
        if FLASH.gqa:
            asked["enable_gqa"] = query_TxHxD.shape[1] != k_pool.shape[2]
        if why_not_pages(k_pool.shape[1]):
            keys, values = self._gathered(k_pool), self._gathered(v_pool)
        else:
            keys, values = k_pool, v_pool
            asked |= {"seqused_k": batch.context_lens_B, "block_table": batch.block_table_BxM}
        out = varlen_attn(
            query_TxHxD.contiguous(),
            keys,
            values,
            batch.query_starts_B1,
            # Asked for with pages too, though lengths and pages say the same.
            batch.key_starts_B1,
            batch.most_rows,
            batch.longest_context,
            **asked,
        )
        assert isinstance(out, Tensor)
        return out

    def _window(self) -> tuple[int, int]:
        """Keys before and after a row's own position that it sees; -1 for all."""
        if 0 < self.options.window < self.batch.longest_context:
            return self.options.window - 1, 0
        # A sequence's only row is its last, and there is no key after it: said so, the kernel reads keys and values
        # once for all query heads that share them.
        return (-1, -1) if self.batch.most_rows == 1 else (-1, 0)

    def _gathered(self, pool_NxPxKxD: Tensor) -> Tensor:
        """The sequences' keys or values one after another, [C, K, D]; C: tokens of all contexts."""
        return pool_NxPxKxD.flatten(0, 1).index_select(0, self.batch.context_slots_C(pool_NxPxKxD.shape[1]))


def why_not_flash(dtype: torch.dtype, head_dim: int, options: AttentionOptions, capability: tuple[int, int]) -> str:
    """Why flash attention cannot compute this layer; empty if it can."""
    if not FLASH.window:
        return f"torch {torch.__version__} has no flash attention with windows; 2.11 has"
    if capability < LEAST_CAPABILITY:
        return f"the GPU is of compute capability {capability[0]}.{capability[1]}, and it needs 8.0"
    if dtype not in _HALF:
        return f"it computes in float16 and bfloat16, not in {str(dtype).removeprefix('torch.')}"
    if head_dim % HEAD_DIM_MULTIPLE or head_dim > LARGEST_HEAD_DIM:
        return f"its head_dim must be a multiple of {HEAD_DIM_MULTIPLE} up to {LARGEST_HEAD_DIM}, not {head_dim}"
    # Whatever else a layer may ask for, now or later, is not passed on to the kernel.
    if options != AttentionOptions(options.scale, options.window):
        return "the model asks for more than causal attention with a window"
    return ""


def why_not_pages(block_size: int) -> str:
    """Why flash attention cannot read the pool's blocks where they lie; empty if it can."""
    if not FLASH.pages:
        return f"torch {torch.__version__} has no flash attention over pages; 2.12 has"
    if block_size % PAGE_MULTIPLE:
        return f"engine.block_size must be a multiple of {PAGE_MULTIPLE}, not {block_size}"
    return ""


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
