"""Between a KV pool and payload bytes. All of this copies, so it runs in a thread unless it is quick (wire_dtype.py).

On cpu the copies are those of kv_transfer/runs.py and never torch's: torch would wake its OpenMP threads, which fight
the engine's for the cores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kv_transfer.checksum import crc32
from kv_transfer.layout import blocks_of
from kv_transfer.runs import Planes, Runs


def gather(pool: Tensor, blocks: Sequence[int], layers: range, tokens: range) -> bytes:
    """The payload [layers, 2, tokens, K, D] of sequence positions `tokens`; `blocks` is the sequence's block table."""
    return pieces(pool, blocks, layers, tokens).gathered()


def pieces(pool: Tensor, blocks: Sequence[int], layers: range, tokens: range) -> Runs:
    """The payload where it lies; on cpu that is the pool itself, so it must be used before that changes."""
    if pool.device.type != "cpu":
        return Runs.of(_bytes_of(gather_slots(pool, blocks, layers, tokens).cpu()))
    return places(planes_of(pool), blocks, pool.shape[3], layers, tokens)


def scatter(pool: Tensor, blocks: Sequence[int], layers: range, tokens: range, payload: bytes | memoryview) -> int:
    """Writes a payload (see gather) into the pool; returns its crc32 when the pool's device has it."""
    if pool.device.type != "cpu":
        scatter_slots(pool, blocks, layers, tokens, payload)
        torch.cuda.current_stream(pool.device).synchronize()
        return crc32(payload)
    return Runs.of(payload).copy_to(places(planes_of(pool), blocks, pool.shape[3], layers, tokens))


def checksum(pool: Tensor, blocks: Sequence[int], layers: range, tokens: range) -> int:
    """crc32 of the payload that lies in these cells, without a copy on cpu."""
    return pieces(pool, blocks, layers, tokens).checksum()


def copy_parts(
    payload: Runs, planes: Planes, blocks: Sequence[int], block_size: int, layers: range, tokens: range
) -> int:
    """Copies a payload (see pieces) to its places in another pool; returns its crc32."""
    return payload.copy_to(places(planes, blocks, block_size, layers, tokens))


def places(planes: Planes, blocks: Sequence[int], block_size: int, layers: range, tokens: range) -> Runs:
    """Where a payload has its cells: a piece for each layer, K or V, and block.

    Raises IndexError for cells outside the pool or the table: what is done to them is not checked again.
    """
    named = blocks_of(tokens, block_size)
    table = blocks[named.start : named.stop]
    if len(table) < len(named):
        raise IndexError("KV cells outside of the block table")
    slot_bytes = planes.block_bytes // block_size
    before = (tokens.start - named.start * block_size) * slot_bytes
    after = (named.stop * block_size - tokens.stop) * slot_bytes
    return Runs.of_blocks(planes, table, layers, before, after)


def planes_of(pool: Tensor) -> Planes:
    num_layers, _, num_blocks, size, heads, width = pool.shape
    return Planes(pool, pool.data_ptr(), num_layers, num_blocks, size * heads * width * pool.element_size())


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


def _bytes_of(tensor: Tensor) -> NDArray[np.uint8]:
    """bfloat16, which numpy does not know, is bytes like the rest."""
    return tensor.detach().view(torch.uint8).numpy()


def runs(blocks: Sequence[int], tokens: range, block_size: int) -> Iterator[tuple[int, int]]:
    """(first slot, count) of each block's share of the positions; the first and the last may be partial."""
    token = tokens.start
    while token < tokens.stop:
        offset = token % block_size
        count = min(block_size - offset, tokens.stop - token)
        yield blocks[token // block_size] * block_size + offset, count
        token += count
