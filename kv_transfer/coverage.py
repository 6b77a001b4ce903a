"""Which (layer, position) cells of a transfer have come: each exactly once."""

from __future__ import annotations

from tandem.errors import TransferFailed


class Coverage:
    """Every layer fills upward from the first position that travels, so one frontier a layer is the whole state."""

    def __init__(self, num_layers: int, tokens: range) -> None:
        """`tokens`: the positions that travel; an empty range is complete from the start."""
        self._tokens = tokens
        # Next position of each layer.
        self._frontier = [tokens.start] * num_layers

    def add(self, layers: range, tokens: range) -> None:
        """Raises TransferFailed for cells out of range, twice, or after a gap; nothing is added then."""
        if not (0 <= layers.start < layers.stop <= len(self._frontier)):
            raise TransferFailed(f"KV of layers {_span(layers)} is outside the {len(self._frontier)} layers")
        if not (self._tokens.start <= tokens.start < tokens.stop <= self._tokens.stop):
            raise TransferFailed(f"KV of positions {_span(tokens)} is outside {_span(self._tokens)}")
        for layer in layers:
            expected = self._frontier[layer]
            if tokens.start != expected:
                what = "came twice" if tokens.start < expected else "came after a gap"
                raise TransferFailed(f"KV of layer {layer}, positions {_span(tokens)} {what}: {expected} is next")
        self._frontier[layers.start : layers.stop] = [tokens.stop] * len(layers)

    def check_complete(self) -> None:
        """Raises TransferFailed, naming the first cell that is missing."""
        for layer, expected in enumerate(self._frontier):
            if expected < self._tokens.stop:
                missing = _span(range(expected, self._tokens.stop))
                raise TransferFailed(f"KV of layer {layer}, positions {missing} is missing at the seal")


def _span(cells: range) -> str:
    return f"[{cells.start}, {cells.stop})"
