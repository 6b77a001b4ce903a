"""How KV lies in a pool and in a payload, and how a range of it is cut into frames.

Shape letters: L layers, N blocks of the pool, P tokens a block, K kv heads, D head_dim, T tokens of a range.
A pool is one tensor [L, 2, N, P, K, D] (K before V); a payload is the bytes of [layers, 2, T, K, D].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from tandem.errors import Refused, TransferFailed
from tandem.types import KV_DTYPES, Fingerprint


@dataclass(frozen=True)
class KVLayout:
    """The sizes that both ends compute for themselves; what a peer claims is only compared with them."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    # A name in KV_DTYPES.
    dtype: str

    @classmethod
    def of(cls, fingerprint: Fingerprint) -> KVLayout:
        """Raises Refused for a dtype that no pool has."""
        if fingerprint.dtype not in KV_DTYPES:
            raise Refused(f"KV of dtype {fingerprint.dtype[:12]!r} cannot travel; {', '.join(KV_DTYPES)} can")
        return cls(
            num_layers=fingerprint.num_layers,
            num_kv_heads=fingerprint.num_kv_heads,
            head_dim=fingerprint.head_dim,
            block_size=fingerprint.block_size,
            dtype=fingerprint.dtype,
        )

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def token_bytes(self) -> int:
        """K and V of one token, all layers."""
        return self.payload_bytes(self.num_layers, 1)

    def payload_bytes(self, layers: int, tokens: int) -> int:
        """K and V of so many tokens in so many layers."""
        return layers * 2 * tokens * self.num_kv_heads * self.head_dim * self.torch_dtype.itemsize

    def pool_in(self, memory: torch.Tensor, blocks: int) -> torch.Tensor:
        """The pool of so many blocks that these bytes are."""
        shape = (self.num_layers, 2, blocks, self.block_size, self.num_kv_heads, self.head_dim)
        return memory.view(self.torch_dtype).view(shape)

    def check_pool(self, pool: torch.Tensor, blocks: Sequence[int], tokens: int) -> None:
        """Raises Refused unless the pool has this layout and the block table holds `tokens` positions in it."""
        shape = (self.num_layers, 2, pool.shape[2] if pool.dim() == 6 else 0, self.block_size)
        if (*pool.shape,) != (*shape, self.num_kv_heads, self.head_dim) or pool.dtype != self.torch_dtype:
            raise Refused(f"the KV pool is {pool.dtype} {list(pool.shape)}, which is not of {self}")
        if not pool.is_contiguous():
            raise Refused("the KV pool is not contiguous")
        if len(blocks) * self.block_size < tokens:
            raise Refused(f"{len(blocks)} blocks of {self.block_size} tokens cannot hold {tokens} tokens")
        if not all(0 <= block < pool.shape[2] for block in blocks):
            raise Refused(f"the block table names blocks outside the pool's {pool.shape[2]}")


def cut(layers: range, tokens: range, cells: int) -> Iterator[tuple[range, range]]:
    """(layers, tokens) of frames of up to `cells` layers x tokens: whole layers if they fit, else tokens of one layer.

    They are about equal. One token of one layer is never cut. Every layer's tokens come in ascending order.
    """
    whole = _share(len(layers), cells // max(1, len(tokens)))
    count = _share(len(tokens), cells)
    for layer in range(layers.start, layers.stop, whole):
        for token in range(tokens.start, tokens.stop, count):
            yield (
                range(layer, min(layer + whole, layers.stop)),
                range(token, min(token + count, tokens.stop)),
            )


def _share(whole: int, most: int) -> int:
    """The size of equal shares, as few as are no larger than `most` (if that is 1 or more)."""
    return max(1, -(-whole // max(1, -(-whole // max(1, most)))))


def blocks_of(tokens: range, block_size: int) -> range:
    """The entries of a block table that hold these positions."""
    return range(tokens.start // block_size, -(-tokens.stop // block_size))


class Coverage:
    """Which (layer, position) cells of a transfer have come: each exactly once.

    Every layer fills upward from the first position that travels, so one frontier a layer is the whole state.
    """

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
