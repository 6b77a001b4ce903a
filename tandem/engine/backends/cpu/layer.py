"""A decoder layer of the usual form (norm, attention, add; norm, gated MLP, add: Llama, Mistral, Qwen2) in seven
launches of kernels, with no transformers code in between. fp32, where there is AVX-512.

What the launches save over the parts one by one: keys and values go from the projections straight to the pool,
turned on the way; residuals are added where sums are written; and little Python, while the other cores wait.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tandem.engine.attention import NAME, PagedStep, Tail, spread
from tandem.engine.backends.backend import backend_for
from tandem.engine.backends.cpu.attention import CpuAttention
from tandem.engine.backends.cpu.kernels.heads import dim_fits, project_heads
from tandem.engine.backends.cpu.modules import FusedRMSNorm, PackedGatedMLP, PackedLinear
from tandem.engine.backends.cpu.probe import REPEATS, RefusedError, random_rows, require_same
from tandem.engine.batch import AttentionOptions, PagedBatch

_PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}


def is_layer(module: nn.Module) -> bool:
    """Whether it has the parts of one, and asks Tandem for its attention."""
    config = getattr(getattr(module, "self_attn", None), "config", None)
    asks_tandem = getattr(config, "_attn_implementation", "") == NAME
    return asks_tandem and {name for name, _ in module.named_children()} == _PARTS


class FusedLayer:
    """The forward of a layer: its own for anything but a step of the engine."""

    def __init__(self, layer: Any) -> None:
        """`layer`: its parts have been fused. Raises RefusedError."""
        _require_fused_parts(layer)
        attention, self._mlp = layer.self_attn, layer.mlp
        self._own, self._attention = layer.forward, attention
        self._norm, self._second_norm = layer.input_layernorm, layer.post_attention_layernorm
        self._query, self._key, self._value = attention.q_proj, attention.k_proj, attention.v_proj
        self._out, self._dim = attention.o_proj, int(attention.head_dim)

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        step, turns = kwargs.get("paged"), kwargs.get("position_embeddings")
        if not isinstance(step, PagedStep) or turns is None or not self._takes(hidden_states, *turns):
            return self._own(hidden_states, *args, **kwargs)
        if self._attention.layer_idx < step.written:  # _attend would write
            return self._own(hidden_states, *args, **kwargs)
        cos, sin = turns
        return self._run(hidden_states[0], cos[0], sin[0], step).unsqueeze(0)

    def _takes(self, x: Tensor, cos: Tensor, sin: Tensor) -> bool:
        whole = cos.shape == sin.shape == (1, x.shape[1], self._dim)
        return whole and all(t.dtype == torch.float32 and t.is_contiguous() for t in (x, cos, sin))

    def _run(self, x: Tensor, cos: Tensor, sin: Tensor, step: PagedStep) -> Tensor:
        tail = step.tail_in(self._attention)
        attended = self._attend(self._norm.forward(x), cos, sin, step, tail)
        if tail is None:
            return self._finish(attended, x)
        return spread(self._finish(attended, x[tail.rows]).unsqueeze(0), tail.rows, x.shape[0])[0]

    def _attend(self, x: Tensor, cos: Tensor, sin: Tensor, step: PagedStep, tail: Tail | None) -> Tensor:
        """[T, H * D]; T: rows of the tail, if there is one."""
        index, batch = self._attention.layer_idx, step.batch
        k_pool, v_pool = step.pools(index)
        query = torch.empty((x if tail is None else tail.rows).shape[0], self._out.in_features // self._dim, self._dim)
        to_query, to_pools = (self._query, query), ((self._key, k_pool), (self._value, v_pool))
        project_heads(x, (to_query if tail is None else None, *to_pools), cos, sin, batch.slots_T)
        step.layer_written(index)
        if tail is not None:
            rows, batch = tail.rows, tail.batch
            project_heads(x[rows], (to_query, None, None), cos[rows], sin[rows], batch.slots_T)
        attention = step.attention(index, tail)
        assert isinstance(attention, CpuAttention)
        return attention.over_pools(query, k_pool, v_pool).flatten(1)

    def _finish(self, attended: Tensor, residual: Tensor) -> Tensor:
        x = self._out.plus(attended, residual)
        hidden = self._mlp.hidden(self._second_norm.forward(x))
        out: Tensor = self._mlp.down.plus(hidden, x, out=x)
        return out


def fused_layer(layer: Any) -> FusedLayer:
    """Compared with the layer itself. Raises RefusedError."""
    fused = FusedLayer(layer)
    for repeats in REPEATS:
        x = random_rows(layer.self_attn.q_proj.in_features).repeat(repeats, 1).unsqueeze(0)
        turns = tuple(torch.randn(1, x.shape[1], layer.self_attn.head_dim) for _ in range(2))
        # All that a model tells its layers of a step. A scale by position shows far from the start.
        last = int(getattr(layer.self_attn.config, "max_position_embeddings", 0) or 1 << 20) - 1
        positions = torch.linspace(0, last, x.shape[1], dtype=torch.float64).long().unsqueeze(0)
        told = {"attention_mask": None, "position_embeddings": turns, "position_ids": positions}
        pools, own_pools = _pools(layer, x.shape[1]), _pools(layer, x.shape[1])
        want = layer.forward(x, **told, paged=_step(layer, x, own_pools))
        got = fused(x, **told, paged=_step(layer, x, pools))
        require_same(want, got)
        for pool, own_pool in zip(pools, own_pools, strict=True):
            require_same(own_pool, pool)
    return fused


def _pools(layer: Any, rows: int) -> tuple[Tensor, Tensor]:
    heads, dim = layer.self_attn.k_proj.out_features // layer.self_attn.head_dim, layer.self_attn.head_dim
    return torch.zeros(1, rows, heads, dim), torch.zeros(1, rows, heads, dim)


def _step(layer: Any, x: Tensor, pools: tuple[Tensor, Tensor]) -> PagedStep:
    """All rows are one prompt, in one block."""
    rows = x.shape[1]
    batch = PagedBatch(
        num_decodes=0,
        query_starts=[0, rows],
        context_lens=[rows],
        block_table_BxM=torch.zeros(1, 1, dtype=torch.int32),
        context_lens_B=torch.tensor([rows], dtype=torch.int32),
        slots_T=torch.arange(rows),
        query_starts_B1=torch.tensor([0, rows], dtype=torch.int32),
    )
    options = {layer.self_attn.layer_idx: AttentionOptions(scale=layer.self_attn.head_dim**-0.5)}
    return PagedStep(backend_for("cpu"), batch, lambda index: pools, options, lambda index: None, None)


def _require_fused_parts(layer: Any) -> None:
    attention, mlp = layer.self_attn, layer.mlp
    if {name for name, _ in attention.named_children()} != _PROJECTIONS:
        raise RefusedError("has other parts than projections in its attention")
    packed = [getattr(attention, name) for name in sorted(_PROJECTIONS)]
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    if not (
        all(isinstance(norm, FusedRMSNorm) for norm in norms)
        and isinstance(mlp, PackedGatedMLP)
        and mlp.is_kernel
        and all(isinstance(linear, PackedLinear) and linear.address for linear in (*packed, mlp.down))
    ):
        raise RefusedError("has a part that no kernel computes")
    if not dim_fits(attention.head_dim):
        raise RefusedError(f"has heads of {attention.head_dim}, which do not go into blocks of 64")
