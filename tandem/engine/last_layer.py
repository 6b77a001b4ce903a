"""Saves the work of the last decoder layer that nobody reads: its MLP, for tokens whose logits are not needed.

A prompt's tokens leave their keys and values behind, and the last layer's come from before its MLP. What comes after
concerns the token that is sampled from alone. That is 1/layers of a prompt's MLP work (7 % of all in a 12-layer Llama).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

# Of a row computed alone from one among others, relative: half precision rounds, a module that mixes differs by 1.
_TOLERANCE = 0.05


class LastLayer:
    """The last decoder layer of a model, cut down to the rows that are needed; whole while none are named."""

    def __init__(self, model: nn.Module, attention: nn.Module) -> None:
        """Changes `model` in place; `attention` is the last attention module that its forward calls."""
        self._rows: Tensor | None = None
        for name, module in _beside(model, attention):
            if _is_rowwise(model, module):
                module.forward = partial(self._forward, module.forward)
            else:
                log.info("%s of the last layer is not computed row by row: left whole", name)

    @contextmanager
    def only(self, rows: Tensor | None) -> Iterator[None]:
        """Within it, forwards need the output of these rows alone; None for all of them."""
        self._rows = rows
        try:
            yield
        finally:
            self._rows = None

    def _forward(self, whole: Any, x: Tensor, *more: Any, **named: Any) -> Any:
        if self._rows is None:
            return whole(x, *more, **named)
        out: Tensor = whole(x[:, self._rows], *more, **named)
        # Zeros, not memory as it was found: the unneeded rows go on through a norm, and NaN there is a false alarm.
        padded = out.new_zeros(*x.shape[:2], out.shape[-1])
        padded[:, self._rows] = out
        return padded


def _beside(model: nn.Module, attention: nn.Module) -> list[tuple[str, nn.Module]]:
    """The attention's siblings that have parts: norms have none and cost little, and one comes before attention."""
    for layer in model.modules():
        children = dict(layer.named_children())
        if any(child is attention for child in children.values()):
            return [(name, child) for name, child in children.items() if child is not attention and _has_parts(child)]
    return []


def _has_parts(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def _is_rowwise(model: Any, module: nn.Module) -> bool:
    """Whether it maps [1, T, hidden] to the same shape, each row by itself; tried on random rows."""
    weight = next(model.parameters())
    x = torch.randn(1, 8, model.config.get_text_config().hidden_size, generator=torch.Generator().manual_seed(0))
    x = x.to(weight)
    rows = torch.tensor([1, 6], device=weight.device)
    with torch.inference_mode():
        among_others, alone = module(x), module(x[:, rows])
    if not isinstance(among_others, Tensor) or among_others.shape != x.shape:
        return False
    difference = (among_others[:, rows] - alone).float().norm() / alone.float().norm()
    return bool(difference < _TOLERANCE)
