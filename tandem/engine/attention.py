"""The one attention function that every model calls, by way of transformers' AttentionInterface.

transformers hands over query, key and value of all tokens of a step in one row, and passes the step's metadata
through the forward's keyword arguments. Each layer's options are recorded once at load (see loading/examination.py),
where anything this function would not honour is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from tandem.engine.backends.backend import Attention, Backend
from tandem.engine.batch import AttentionOptions, PagedBatch
from tandem.errors import ModelRefused

# Name of the attention that serves; models build no masks for it.
NAME = "tandem_paged"
NOT_PASSED_ON = "it does not pass keyword arguments on to its attention layers"


@dataclass(frozen=True)
class Tail:
    """The rows of a step that are read after the last layer: its attention is computed for these alone."""

    # int64 [R] on the device.
    rows: Tensor
    # The same rows, each a sequence of its own.
    batch: PagedBatch
    last_attention: nn.Module


@dataclass(frozen=True)
class PagedStep:
    """What one step's attention calls need; travels through the forward as the keyword argument `paged`."""

    backend: Backend
    batch: PagedBatch
    # K and V of a layer, each [N, P, K, D].
    pools: Callable[[int], tuple[Tensor, Tensor]]
    options: dict[int, AttentionOptions]
    # Told of each layer when its K and V are in the pool.
    layer_written: Callable[[int], None]
    # None where every row is read.
    tail: Tail | None
    # So many layers' K and V are in the pool already, and may be on their way to others: they stay as they are.
    written: int = 0
    # Plans of the step, by what layers ask for: made when the first of them does.
    _plans: dict[AttentionOptions, Attention] = field(default_factory=dict)

    def attention(self, layer: int, tail: Tail | None) -> Attention:
        """For the rows of the step, or of its tail alone."""
        options = self.options[layer]
        if tail is not None:
            return self.backend.plan_attention(tail.batch, options)
        if options not in self._plans:
            self._plans[options] = self.backend.plan_attention(self.batch, options)
        return self._plans[options]

    def tail_in(self, attention: Any) -> Tail | None:
        """The tail, if it begins in this attention module."""
        return self.tail if self.tail is not None and self.tail.last_attention is attention else None

    def run(self, module: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        layer, tail = module.layer_idx, self.tail_in(module)
        k_pool, v_pool = self.pools(layer)
        query_TxHxD, key_TxKxD, value_TxKxD = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        if layer >= self.written:
            self.backend.write_kv(key_TxKxD, value_TxKxD, k_pool, v_pool, self.batch)
        self.layer_written(layer)
        asking = query_TxHxD if tail is None else query_TxHxD[tail.rows]
        out = self.attention(layer, tail)(asking, key_TxKxD, value_TxKxD, k_pool, v_pool).unsqueeze(0)
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
    if not isinstance(step, PagedStep):
        raise ModelRefused(NOT_PASSED_ON)
    return step.run(module, query, key, value), None


AttentionInterface.register(NAME, paged_attention)
