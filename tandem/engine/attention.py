"""The one attention function that every model calls, by way of transformers' AttentionInterface.

transformers hands over query, key and value of all tokens of a step in one row, and passes the step's metadata
through the forward's keyword arguments. Each layer's options are recorded once at load (see examination.py), where
anything this function would not honour is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from tandem.engine import masks
from tandem.engine.batch import AttentionOptions, PagedBatch
from tandem.errors import ModelRefused

# Of the attention that serves; models build no masks for it.
NAME = "tandem_paged"
# Of the attention that records, at load; each layer hears its mask.
PROBE = "tandem_probe"
# attention(query, key, value, k_pool, v_pool, batch, options) -> out, all [T, heads, D]; K and V are in the pool.
PagedAttention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, PagedBatch, AttentionOptions], Tensor]

# Keyword arguments that do not change attention over the step's own metadata. The sliding window is a hint to other
# libraries: in transformers' own attention the mask alone hides keys.
_HARMLESS = {
    *("dropout", "position_ids", "cache_position", "is_causal", "use_cache", "layer_idx", "position_embeddings"),
    *("sliding_window", "logits_to_keep"),
}
_HONOURED = {"scaling", "softcap"}


@dataclass(frozen=True)
class LayerShape:
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype


@dataclass
class Probe:
    """Records what each layer asks of attention, in a forward pass at load, in the order of calls; computes none."""

    options: dict[int, AttentionOptions] = field(default_factory=dict)
    shapes: dict[int, LayerShape] = field(default_factory=dict)
    # The module that called most recently.
    last: Any = None

    def run(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, asked: dict[str, Any]) -> Tensor:
        """Raises ModelRefused for what is not honoured."""
        layer = getattr(module, "layer_idx", None)
        if not isinstance(layer, int):
            raise ModelRefused(f"its {type(module).__name__} does not say which layer it is of (layer_idx)")
        if layer in self.options:
            raise ModelRefused(f"layer {layer} computes attention more than once")
        if not getattr(module, "is_causal", True):
            raise ModelRefused(f"layer {layer} is not causal: it is not a decoder-only language model")
        heard = masks.require_mask(mask, layer)
        if key.shape != value.shape:
            raise ModelRefused("its keys and values differ in shape")
        if key.shape[2] != query.shape[2]:
            raise ModelRefused(f"layer {layer} attends to {key.shape[2]} keys of {query.shape[2]} tokens")
        _refuse_unknown(asked)
        self.last = module
        self.options[layer] = _options(query, heard, asked)
        self.shapes[layer] = LayerShape(key.shape[1], key.shape[3], key.dtype)
        return query.transpose(1, 2)


@dataclass(frozen=True)
class Tail:
    """The rows of a step that are read after the last layer: its attention is computed for these alone."""

    rows: Tensor
    # In which each of the rows is a sequence of its own.
    batch: PagedBatch
    last_attention: nn.Module


@dataclass(frozen=True)
class Step:
    """What one step's attention calls need; travels through the forward as the keyword argument `paged`."""

    batch: PagedBatch
    # K and V of a layer, each [N, P, K, D].
    pools: Callable[[int], tuple[Tensor, Tensor]]
    options: dict[int, AttentionOptions]
    attention: PagedAttention
    write: Callable[[Tensor, Tensor, Tensor, Tensor, PagedBatch], None]
    # Told of each layer when its K and V are in the pool.
    layer_written: Callable[[int], None]
    # None where every row is read.
    tail: Tail | None
    # So many layers' K and V are in the pool already, and may be on their way to others: they stay as they are.
    written: int = 0

    def run(self, module: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        k_pool, v_pool = self.pools(module.layer_idx)
        query_TxHxD, key_TxKxD, value_TxKxD = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        if module.layer_idx >= self.written:
            self.write(key_TxKxD, value_TxKxD, k_pool, v_pool, self.batch)
        self.layer_written(module.layer_idx)
        tail = self.tail if self.tail is not None and self.tail.last_attention is module else None
        out = self.attention(
            query_TxHxD if tail is None else query_TxHxD[tail.rows],
            *(key_TxKxD, value_TxKxD, k_pool, v_pool),
            self.batch if tail is None else tail.batch,
            self.options[module.layer_idx],
        ).unsqueeze(0)
        return out if tail is None else spread(out, tail.rows, query_TxHxD.shape[0])


def spread(part: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """[1, R, ...] to [1, num_rows, ...], with the part's rows in their places.

    The others are zero, not memory as it was found: they go on through norms, where a NaN would be a false alarm.
    """
    whole = part.new_zeros(1, num_rows, *part.shape[2:])
    whole[:, rows] = part
    return whole


def paged_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' contract: query [1, H, T, D], key and value [1, K, T, D] → ([1, T, H, D], no weights)."""
    step = kwargs.get("paged")
    if not isinstance(step, Step):
        raise ModelRefused(_NOT_PASSED_ON)
    return step.run(module, query, key, value), None


def probed_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """The same contract, under the other name."""
    probe = kwargs.pop("paged", None)
    if not isinstance(probe, Probe):
        raise ModelRefused(_NOT_PASSED_ON)
    return probe.run(module, query, key, value, attention_mask, kwargs), None


_NOT_PASSED_ON = "it does not pass keyword arguments on to its attention layers"
AttentionInterface.register(NAME, paged_attention)
AttentionInterface.register(PROBE, probed_attention)
masks.register(PROBE)


def _refuse_unknown(asked: dict[str, Any]) -> None:
    for name, value in asked.items():
        if name in _HONOURED or name in _HARMLESS or value is None or value is False:
            continue
        raise ModelRefused(f"it needs the attention argument {name}, which Tandem does not honour")


def _options(query: Tensor, mask: masks.HeardMask, asked: dict[str, Any]) -> AttentionOptions:
    scale = asked.get("scaling")
    return AttentionOptions(
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
        window=mask.window,
        chunk=mask.chunk,
        softcap=float(asked.get("softcap") or 0.0),
    )
