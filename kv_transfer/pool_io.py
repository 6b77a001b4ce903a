"""Between a KV pool and payload bytes. Everything here copies, so it runs in a thread, never in the event loop.

On cpu the copies are numpy's and never torch's: torch would wake its OpenMP threads, which fight the engine's for the
cores. A block of one layer is contiguous memory, so a payload is a list of views that is joined once (1 MiB: 35 µs;
an index_select over slots and a copy to bytes: 500 µs).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kv_transfer.checksum import crc32, crc32_of_parts

# A pool's bytes: uint8 [L, 2, N * P, K * D * itemsize].
Rows = NDArray[np.uint8]


def gather(pool: Tensor, blocks: Sequence[int], layers: range, tokens: range) -> bytes:
    """The payload [layers, 2, tokens, K, D] of sequence positions `tokens`; `blocks` is the sequence's block table."""
    return b"".join(pieces(pool, blocks, layers, tokens))


def pieces(pool: Tensor, blocks: Sequence[int], layers: range, tokens: range) -> list[memoryview]:
    """The payload as contiguous parts in order; on cpu views of the pool, so they must be used before it changes."""
    if pool.device.type != "cpu":
        return [_bytes_of(gather_slots(pool, blocks, layers, tokens).cpu()).data]
    rows = _rows(pool)
    spans = list(runs(blocks, tokens, pool.shape[3]))
    return [rows[layer, side, slot : slot + count].data for layer in layers for side in (0, 1) for slot, count in spans]


def scatter(pool: Tensor, blocks: Sequence[int], layers: range, tokens: range, payload: bytes | memoryview) -> None:
    """Writes a payload (see gather) into the pool; returns when the pool's device has it."""
    if pool.device.type != "cpu":
        scatter_slots(pool, blocks, layers, tokens, payload)
        torch.cuda.current_stream(pool.device).synchronize()
        return
    rows = _rows(pool)[layers.start : layers.stop]
    parts = np.frombuffer(payload, dtype=np.uint8).reshape(len(layers), 2, len(tokens), -1)
    done = 0
    for slot, count in runs(blocks, tokens, pool.shape[3]):
        rows[:, :, slot : slot + count] = parts[:, :, done : done + count]
        done += count


def checksum(pool: Tensor, blocks: Sequence[int], layers: range, tokens: range) -> int:
    """crc32 of the payload that lies in these cells, without a copy on cpu."""
    return crc32_of_parts(pieces(pool, blocks, layers, tokens))


def copy_parts(
    parts: Sequence[memoryview], rows: Rows, blocks: Sequence[int], block_size: int, layers: range, tokens: range
) -> int:
    """Copies the parts of a payload (see pieces) to their places in another pool; returns the payload's crc32.

    One after the other, so that each is in the processor's cache when its checksum is taken.
    """
    spans = list(runs(blocks, tokens, block_size))
    places = [rows[layer, side, slot : slot + count] for layer in layers for side in (0, 1) for slot, count in spans]
    if len(parts) < len(places):  # a device gathers all of it into one
        parts = _divide(parts[0], [place.nbytes for place in places])
    crc = 0
    for part, place in zip(parts, places, strict=True):
        np.copyto(place, np.frombuffer(part, dtype=np.uint8).reshape(place.shape))
        crc = crc32(part, crc)
    return crc


def gather_slots(pool: Tensor, blocks: Sequence[int], layers: range, tokens: range) -> Tensor:
    """The payload as one tensor [layers, 2, tokens, K * D] on the pool's device: one kernel."""
    return _slot_view(pool, layers).index_select(2, _slots(pool, blocks, tokens))


def scatter_slots(
    pool: Tensor, blocks: Sequence[int], layers: range, tokens: range, payload: bytes | memoryview
) -> None:
    """Writes a payload into a pool on any device: one copy to the device, one kernel."""
    # A tensor over read-only bytes is not allowed, hence the host copy.
    staged = torch.from_numpy(np.frombuffer(payload, dtype=np.uint8).copy()).view(pool.dtype)
    write_slots(pool, blocks, layers, tokens, staged.view(len(layers), 2, len(tokens), -1).to(pool.device))


def write_slots(pool: Tensor, blocks: Sequence[int], layers: range, tokens: range, values: Tensor) -> None:
    """Writes values [layers, 2, tokens, K * D] of the pool's dtype and device into it: one kernel."""
    _slot_view(pool, layers).index_copy_(2, _slots(pool, blocks, tokens), values)


def _slot_view(pool: Tensor, layers: range) -> Tensor:
    return pool.flatten(4).flatten(2, 3)[layers.start : layers.stop]


def _slots(pool: Tensor, blocks: Sequence[int], tokens: range) -> Tensor:
    found = runs(blocks, tokens, pool.shape[3])
    slots = np.concatenate([np.arange(slot, slot + count) for slot, count in found])
    return torch.from_numpy(slots).to(pool.device)


def _rows(pool: Tensor) -> Rows:
    """bfloat16, which numpy does not know, is bytes like the rest."""
    return _bytes_of(pool).reshape(pool.shape[0], 2, pool.shape[2] * pool.shape[3], -1)


def _divide(whole: memoryview, sizes: Sequence[int]) -> list[memoryview]:
    flat = whole.cast("B")
    ends = list(accumulate(sizes))
    return [flat[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def _bytes_of(tensor: Tensor) -> NDArray[np.uint8]:
    return tensor.detach().view(torch.uint8).numpy()


def runs(blocks: Sequence[int], tokens: range, block_size: int) -> Iterator[tuple[int, int]]:
    """(first slot, count) of each block's share of the positions; the first and the last may be partial."""
    token = tokens.start
    while token < tokens.stop:
        offset = token % block_size
        count = min(block_size - offset, tokens.stop - token)
        yield blocks[token // block_size] * block_size + offset, count
        token += count
