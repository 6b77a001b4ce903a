"""Wire dtype `int8`: symmetric, with one scale for each layer, K or V, block and kv head.

    scale = max |x| / 127          q = round(x / scale), to even          x' = q * scale

A frame may hold only a share of a block: the scale is of that share then. All arithmetic is in float32, so |x - x'| is
at most half a scale, besides the rounding of x' to the pool's dtype. Zeros stay zeros. Values that are not finite have
no place here: the sender refuses them.

A payload is the scales, float32 [layers, 2, S, K], then the values, int8 [layers, 2, T, K, D]; S counts the blocks that
the T tokens lie in. On cpu the work is numpy's (see cells.py), on a device torch's, and what travels to and from the
device is the payload.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kv_transfer.frames.cells import Cells, Native, device_memory, slot_spans, to_device, to_host
from kv_transfer.frames.layout import KVLayout, blocks_of
from kv_transfer.frames.runs import Runs, crc32
from tandem.errors import Refused, TransferFailed

_MOST = 127
# The least scale: numbers below it have lost their precision, and nothing is divided by zero.
_LEAST_SCALE = np.finfo(np.float32).tiny
_SCALE_BYTES = 4
_Floats = NDArray[np.float32]
_Values = NDArray[np.int8]


class Int8(Native):
    """Payloads in int8."""

    name = "int8"

    def __init__(self, layout: KVLayout) -> None:
        super().__init__(layout)
        self._width = layout.num_kv_heads * layout.head_dim
        # So that no x' is above the largest number of the pool's dtype.
        self._largest_scale = np.nextafter(np.float32(torch.finfo(layout.torch_dtype).max / _MOST), np.float32(0))

    def payload_bytes(self, layers: int, tokens: range) -> int:
        return (
            layers * 2 * (self._shares(tokens) * self._layout.num_kv_heads * _SCALE_BYTES + len(tokens) * self._width)
        )

    def is_quick(self, cells: Cells) -> bool:
        return False

    def pieces(self, cells: Cells) -> Runs:
        if cells.pool.device.type == "cpu":
            return Runs.of(*self.quantize_on_host(cells))
        with device_memory():
            return Runs.of(*self.quantize_on_device(cells))

    def scatter(self, cells: Cells, payload: bytes | memoryview, checksum: int) -> bool:
        if crc32(payload) != checksum:
            return False
        scales, values = self._parse(len(cells.layers), cells.tokens, payload)
        if cells.pool.device.type == "cpu":
            self.write_on_host(cells, scales, values)
        else:
            with device_memory():
                self.write_on_device(cells, scales, values)
                torch.cuda.current_stream(cells.pool.device).synchronize()
        return True

    # Cpu.

    def quantize_on_host(self, cells: Cells) -> tuple[_Floats, _Values]:
        """Scales [layers, 2, S, K] and values [layers, 2, T, K * D]. Whole blocks are taken and the rest is blanked."""
        pool, layers, tokens = cells.pool, cells.layers, cells.tokens
        size, heads, shares = self._layout.block_size, self._layout.num_kv_heads, self._shares(tokens)
        named = np.array(cells.blocks[tokens.start // size :][:shares])
        before = tokens.start % size
        within = slice(before, before + len(tokens))
        source = _array(pool).reshape(*pool.shape[:4], self._width)
        scales = np.empty((len(layers), 2, shares, heads), np.float32)
        values = np.empty((len(layers), 2, len(tokens), self._width), np.int8)
        # Memory that is touched for the first time is slow: all layers use this.
        numbers = np.empty((shares, size, self._width), np.float32)
        sizes = np.empty_like(numbers)
        rows = numbers.reshape(-1, self._width)
        for at, layer in enumerate(layers):
            for side in (0, 1):
                _widen(source[layer, side], named, numbers)
                rows[: within.start], rows[within.stop :] = 0, 0
                np.abs(numbers, out=sizes)
                scales[at, side] = self._scales(sizes.max(axis=1).reshape(shares, heads, -1).max(axis=2))
                np.divide(numbers, self._wide(scales[at, side])[:, None], out=numbers)
                np.rint(numbers, out=numbers)
                values[at, side] = rows[within]
        return scales, values

    def write_on_host(self, cells: Cells, scales: _Floats, values: _Values) -> None:
        """Scales [layers, 2, S, K] and values [layers, 2, T, K * D]."""
        pool, layers = cells.pool, cells.layers
        array = _array(pool).reshape(pool.shape[0], 2, -1, self._width)[layers.start : layers.stop]
        wide = self._wide(scales)
        done = 0
        for share, (slot, count) in enumerate(slot_spans(cells.blocks, cells.tokens, self._layout.block_size)):
            part = values[:, :, done : done + count]
            _narrow(part, wide[:, :, share, None], array[:, :, slot : slot + count])
            done += count

    # Devices.

    def quantize_on_device(self, cells: Cells) -> tuple[_Floats, _Values]:
        """As quantize_on_host, for a pool on any device."""
        pool, layers, tokens = cells.pool, cells.layers, cells.tokens
        size, shares = self._layout.block_size, self._shares(tokens)
        before = tokens.start % size
        within = slice(before, before + len(tokens))
        numbers = torch.zeros((len(layers), 2, shares * size, self._width), device=pool.device)
        numbers[:, :, within] = cells.gather_slots().float()
        by_head = numbers.view(len(layers), 2, shares, size, self._layout.num_kv_heads, -1)
        scales = self._scales(to_host(by_head.abs().amax(dim=(3, 5))).numpy())
        by_head /= to_device(scales, pool.device)[:, :, :, None, :, None]
        return scales, to_host(numbers[:, :, within].round().to(torch.int8)).numpy()

    def write_on_device(self, cells: Cells, scales: _Floats, values: _Values) -> None:
        """As write_on_host, for a pool on any device."""
        size, device = self._layout.block_size, cells.pool.device
        share_of = torch.arange(len(cells.tokens), device=device).add_(cells.tokens.start % size) // size
        wide = to_device(self._wide(scales), device)[:, :, share_of]
        numbers = to_device(values, device) * wide
        cells.write_slots(numbers.to(cells.pool.dtype))

    # Both.

    def _shares(self, tokens: range) -> int:
        return len(blocks_of(tokens, self._layout.block_size))

    def _scales(self, largest: _Floats) -> _Floats:
        """Raises Refused for what is not finite."""
        if not np.isfinite(largest).all():
            raise Refused("KV holds infinity or NaN, and cannot travel in wire dtype int8")
        scales: _Floats = np.clip(largest / np.float32(_MOST), _LEAST_SCALE, self._largest_scale)
        return scales

    def _wide(self, scales: _Floats) -> _Floats:
        """[..., K] for each number of a token: [..., K * D]."""
        return np.repeat(scales, self._layout.head_dim, axis=-1)

    def _parse(self, layers: int, tokens: range, payload: bytes | memoryview) -> tuple[_Floats, _Values]:
        """Raises TransferFailed for numbers that no sender makes: they could end as infinity or NaN in the pool."""
        shape = (layers, 2, self._shares(tokens), self._layout.num_kv_heads)
        count = int(np.prod(shape))
        scales = np.frombuffer(payload, np.float32, count).reshape(shape)
        values = np.frombuffer(payload, np.int8, offset=count * _SCALE_BYTES)
        if not ((scales >= _LEAST_SCALE) & (scales <= self._largest_scale)).all() or values.min() < -_MOST:
            raise TransferFailed("a KV payload in wire dtype int8 holds a scale or a value out of range")
        return scales, values.reshape(layers, 2, len(tokens), self._width)


# numpy does not know bfloat16: to it these are the upper halves of float32 numbers.


def _array(pool: Tensor) -> NDArray[Any]:
    pool = pool.detach()
    return pool.view(torch.uint16).numpy() if pool.dtype == torch.bfloat16 else pool.numpy()


def _widen(source: NDArray[Any], named: NDArray[np.int64], numbers: _Floats) -> None:
    """numbers [S, P, K * D] = the named blocks of source [N, P, K * D]."""
    if source.dtype == np.float32:
        np.take(source, named, axis=0, out=numbers, mode="clip")  # the default mode would copy once more
    elif source.dtype == np.float16:
        numbers[...] = source[named]
    else:
        np.left_shift(source[named], 16, out=numbers.view(np.uint32), dtype=np.uint32)


def _narrow(values: _Values, scales: _Floats, target: NDArray[Any]) -> None:
    """target = values * scales, rounded to nearest, ties to even."""
    if target.dtype != np.uint16:
        np.multiply(values, scales, out=target, dtype=np.float32, casting="same_kind")
        return
    bits = np.multiply(values, scales, dtype=np.float32).view(np.uint32)
    bits += ((bits >> 16) & 1) + np.uint32(0x7FFF)
    np.right_shift(bits, 16, out=target, casting="unsafe")
