"""Hears which attention mask each layer of a model would have had.

transformers builds a model's masks by functions registered under the name of its attention. The one registered here
builds none: what it returns says which mask it would have been, or why Tandem has no such mask, and arrives at the
attention of just those layers that would have got the mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_overlay,
    sliding_window_overlay,
)

from tandem.engine.batch import AttentionOptions
from tandem.errors import ModelRefused

# Mask functions are closures that share their code with every other one of their kind.
_AND = and_masks().__code__
_SLIDING = sliding_window_overlay(1).__code__
_CHUNKED = chunked_overlay(1, torch.zeros(1)).__code__

_BIDIRECTIONAL = "bidirectional attention (a token would see later ones)"


@dataclass(frozen=True)
class HeardMask:
    """Stands where a layer's mask would be."""

    causal: bool = False
    # As in AttentionOptions; 0 means none.
    window: int = 0
    chunk: int = 0
    # What else it is made of, of which Tandem knows nothing.
    unknown: str = ""

    def _computed_with(*_: Any, **__: Any) -> Any:
        raise ModelRefused("it computes with the attention masks that transformers makes, or makes others of them")

    # What a model may do with a mask, other than to hand it on to its attention.
    __getattr__ = __getitem__ = __add__ = __radd__ = __mul__ = __and__ = __invert__ = __bool__ = _computed_with
    __torch_function__ = _computed_with

    def joined(self, other: HeardMask) -> HeardMask:
        """What both show."""
        # The smallest of nested windows counts; chunks of different lengths would be something else.
        chunks = {self.chunk, other.chunk} - {0}
        return HeardMask(
            self.causal or other.causal,
            min({self.window, other.window} - {0}, default=0),
            max(chunks, default=0),
            self.unknown or other.unknown or ("chunks of two lengths" if len(chunks) > 1 else ""),
        )


def require_mask(mask: Any, layer: int) -> HeardMask:
    """What arrived as a layer's mask, when it is one that Tandem has. Raises ModelRefused."""
    if isinstance(mask, Tensor):
        raise ModelRefused(f"layer {layer} has a mask that is not made through transformers' AttentionMaskInterface")
    if not isinstance(mask, HeardMask):
        raise ModelRefused(f"layer {layer} wants {_BIDIRECTIONAL}")
    if mask.unknown:
        raise ModelRefused(f"layer {layer} has an attention mask that Tandem does not know: {mask.unknown}")
    if not mask.causal:
        raise ModelRefused(f"layer {layer} wants {_BIDIRECTIONAL}")
    return mask


def hear(
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **_rest: Any,
) -> HeardMask:
    """transformers' contract of a mask function, for one sequence without a cache."""
    if attention_mask is not None and not bool(attention_mask.all()):
        return HeardMask(unknown="one that hides padding")
    if q_length != kv_length:
        return HeardMask(unknown=f"{q_length} queries against {kv_length} keys")
    mask = _described(mask_function)
    if not mask.unknown and not _agrees(mask_function, mask):
        return HeardMask(unknown=f"{_name(mask_function)} hides other keys than its name says")
    return mask


def _described(function: Callable[..., Any]) -> HeardMask:
    if function is causal_mask_function:
        return HeardMask(causal=True)
    if function is bidirectional_mask_function:
        return HeardMask()
    code = getattr(function, "__code__", None)
    held = inspect.getclosurevars(function).nonlocals if code in (_AND, _SLIDING, _CHUNKED) else {}
    if code is _AND:
        mask = HeardMask()
        for part in held["mask_functions"]:
            mask = mask.joined(_described(part))
        return mask
    if code is _SLIDING:
        return HeardMask(window=int(held["sliding_window"]))
    if code is _CHUNKED and not bool(torch.as_tensor(held["left_padding"]).any()):
        return HeardMask(chunk=int(held["chunk_size"]))
    return HeardMask(unknown=_name(function))


def _agrees(function: Callable[..., Any], mask: HeardMask) -> bool:
    """Whether the function shows what the description says, around the edges of windows and chunks."""
    edges = {0, *(length * times for length in (mask.window, mask.chunk) for times in (1, 2, 3))}
    positions = torch.tensor(sorted({max(edge + near, 0) for edge in edges for near in range(-2, 3)}))
    query, key, zero = positions[:, None], positions[None, :], torch.zeros(1, 1, dtype=torch.long)
    options = AttentionOptions(scale=1.0, window=mask.window, chunk=mask.chunk)
    oldest = torch.tensor([options.first_key(position) for position in positions.tolist()])[:, None]
    wanted = key >= oldest
    if mask.causal:
        wanted &= key <= query
    shown = torch.as_tensor(function(zero, zero, query, key))
    # A window or chunk alone says nothing of later keys.
    relevant = torch.ones_like(wanted) if mask.causal else key <= query
    return bool((shown.expand_as(wanted) == wanted)[relevant.expand_as(wanted)].all())


def _name(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__qualname__", function)).split(".<locals>")[0]
