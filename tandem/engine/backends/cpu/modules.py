"""The modules that `fusion.py` puts in place of a transformers model's own: fp32, inference only.

Weights are kept in oneDNN's blocked layout alone: it reads them at twice the rate of the plain layout for one row,
multiplies twice as fast at 16 rows and no slower at 4096, so nothing is gained by keeping the plain one too. Where
there is AVX-512, `kernels/matmul.py` reads the same packed weights and is faster still (1.3 times at 1 to 16 rows).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tandem.engine.backends.cpu.kernels.matmul import gated_product, product, weights_address
from tandem.engine.backends.cpu.kernels.rowwise import rms_norm, rotary, silu_product

# The layout that oneDNN picks for 16 rows is within 5 % of the best at any row count.
_ROWS_PACKED_FOR = 16


def _pack(weight_NxK: Tensor) -> Tensor:
    """An opaque tensor in oneDNN's layout; it keeps its shape, dtype and device, and any other operator refuses it."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_NxK.detach().contiguous(), _ROWS_PACKED_FOR)
    return packed


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none", algorithm: str = "") -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], algorithm)
    return out


class PackedLinear(nn.Module):
    """x @ weight.T + bias with the weight packed by oneDNN; memory: that of the weight, once."""

    def __init__(self, weight_NxK: Tensor, bias_N: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_NxK.shape
        # Not a parameter: model code may read its shape and dtype, nothing may do arithmetic on it.
        self.weight = _pack(weight_NxK)
        self.bias = None if bias_N is None else bias_N.detach().contiguous()
        # 0 where only oneDNN can read them.
        self.address = weights_address(self.weight, weight_NxK)

    def forward(self, x: Tensor) -> Tensor:
        if self.address:
            return product(x, self)
        return _linear(x, self.weight, self.bias)

    def plus(self, x: Tensor, residual: Tensor, out: Tensor | None = None) -> Tensor:
        """residual + forward(x), where there is an address. out: where it goes; it may be the residual."""
        return product(x, self, residual, out)


class PackedGatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)), with activation and product done as the matrices are written."""

    def __init__(self, gate: PackedLinear, up: PackedLinear, down: PackedLinear, activation: tuple[str, str]) -> None:
        super().__init__()
        self.gate, self.up, self.down = gate, up, down
        # oneDNN's name of the activation, and of its algorithm.
        self.activation, self.algorithm = activation
        self.is_silu = self.activation == "swish"
        self.is_kernel = self.is_silu and bool(gate.address and up.address)

    def forward(self, x: Tensor) -> Tensor:
        return self.down.forward(self.hidden(x))

    def hidden(self, x: Tensor) -> Tensor:
        """What goes into `down`."""
        gate, up = self.gate, self.up
        if self.is_kernel:
            return gated_product(x, gate, up)
        if self.is_silu:
            # oneDNN's own way of doing this costs its products 6 %, twice what one more pass does.
            return silu_product(_linear(x, gate.weight, gate.bias), _linear(x, up.weight, up.bias))
        gated = _linear(x, gate.weight, gate.bias, self.activation, self.algorithm)
        hidden: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, gated, up.weight, up.bias, "mul")
        return hidden


class FusedRMSNorm(nn.Module):
    """RMSNorm in one pass over its input; `weight` is the factor itself (Gemma's 1 + weight is added beforehand)."""

    def __init__(self, weight: Tensor, epsilon: float) -> None:
        super().__init__()
        self.weight = weight.detach().contiguous()
        self.variance_epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.variance_epsilon)


def fused_rotary(original: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """`apply_rotary_pos_emb(q, k, cos, sin)` in one pass where the layout is the engine's, else the original."""

    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **named: Any) -> Any:
        if more or named or not _rotary_applies(q, k, cos, sin):
            return original(q, k, cos, sin, *more, **named)
        return rotary(q, k, cos, sin)

    return apply_rotary_pos_emb


def _rotary_applies(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    whole = q.shape[0] == 1 and cos.shape == sin.shape == (1, *q.shape[2:]) == (1, *k.shape[2:])
    dense = q.stride(3) == k.stride(3) == 1 and cos.is_contiguous() and sin.is_contiguous()
    return whole and dense and all(t.dtype == torch.float32 for t in (q, k, cos, sin))
