"""Saves the work of the last decoder layer that nobody reads.

A prompt's tokens leave their keys and values behind, and the last layer's come from before its attention. The rest of
that layer concerns only the tokens whose logits are wanted, one of a prompt: for the others it is not computed. In a
Llama of 12 layers that is 8 % of a prompt's work.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tandem.engine.attention import Tail, spread
from tandem.engine.backends.backend import Backend
from tandem.engine.batch import PagedBatch
from tandem.engine.loading.failures import of_the_machine

log = logging.getLogger(__name__)

# What transformers calls the projections to queries and from the heads' outputs, where keys and values have their own.
_PROJECTIONS = {"q_proj", "o_proj", "out_proj", "dense", "c_proj"}
# Difference of a row computed alone and among others, relative: half precision rounds, mixing makes it 1.
_TOLERANCE = 0.05


class LastLayer:
    """The last decoder layer of a model; inside `only` its modules compute no rows but those that are read."""

    def __init__(self, model: nn.Module, attention: nn.Module) -> None:
        """Changes `model` in place; `attention` is the last attention module that its forward calls."""
        self._attention = attention
        self._rows: Tensor | None = None
        projections = [child for name, child in attention.named_children() if name in _PROJECTIONS]
        candidates = [*projections, *_beside(model, attention)]
        # What the modules compute, by module, of all the rows that they are given.
        self._whole = {module: module.forward for module in candidates if _is_rowwise(model, module)}
        log.debug("the last layer is cut in %d of %d modules", len(self._whole), len(candidates))
        for module, whole in self._whole.items():
            module.forward = partial(self._forward, whole)

    def restore(self) -> None:
        """All rows are computed from now on."""
        for module, whole in self._whole.items():
            module.forward = whole
        self._whole.clear()

    def tail(self, rows: list[int], batch: PagedBatch, backend: Backend) -> Tail | None:
        """For a step of which `rows` are read; None where cutting the others saves little or nothing, or is over.

        More rows than sequences are a mean over a prompt: attention row by row would cost more than it saves.
        """
        if not self._whole or len(rows) > len(batch.context_lens) or len(rows) == batch.query_starts[-1]:
            return None
        # One at least: kernels need not cope with none.
        return Tail(*batch.rows_alone(rows or [0], backend.send), self._attention)

    @contextmanager
    def only(self, tail: Tail | None) -> Iterator[None]:
        """Forwards inside are cut to the tail."""
        self._rows = None if tail is None else tail.rows
        try:
            yield
        finally:
            self._rows = None

    def _forward(self, whole: Any, x: Tensor) -> Any:
        if self._rows is None:
            return whole(x)
        return spread(whole(x[:, self._rows]), self._rows, x.shape[1])


def _beside(model: nn.Module, attention: nn.Module) -> list[nn.Module]:
    """The attention's siblings that have parts: norms have none and cost little, and one comes before attention."""
    for layer in model.modules():
        siblings = [child for child in layer.children() if child is not attention]
        if len(siblings) < len(list(layer.children())):
            return [child for child in siblings if next(child.children(), None) is not None]
    return []


def _is_rowwise(model: Any, module: Any) -> bool:
    """Whether it maps [1, T, width] to [1, T, any], each row by itself; tried on random rows."""
    weight = next(module.parameters(), next(model.parameters()))
    # Its own word, torch's or transformers', or that of the hidden states.
    width = getattr(module, "in_features", None) or getattr(module, "nx", None)
    rows = torch.tensor([1, 6], device=weight.device)
    try:
        x = torch.randn(
            1, 8, width or model.config.get_text_config().hidden_size, generator=torch.Generator().manual_seed(0)
        ).to(weight)
        with torch.inference_mode():
            among_others, alone = module(x), module(x[:, rows])
    except Exception as error:  # the module is the model's: it may want other arguments, and say so in any way
        if of_the_machine(error):
            raise
        log.debug("a module of the last layer takes more than rows: %s", error)
        return False
    if not isinstance(among_others, Tensor) or among_others.shape[:2] != x.shape[:2]:
        return False
    difference = (among_others[:, rows] - alone).float().norm() / alone.float().norm()
    return bool(difference < _TOLERANCE)
