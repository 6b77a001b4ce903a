"""Between cells of a KV pool and payload bytes. All of this copies, so it runs in a thread unless it is quick
(`Native.is_quick`).

On cpu the copies are those of runs.py and never torch's: torch would wake its OpenMP threads, which fight
the engine's for the cores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kv_transfer.frames.layout import KVLayout, blocks_of
from kv_transfer.frames.runs import Planes, Runs, crc32
from tandem.errors import TransferFailed
from tandem.out_of_memory import is_out_of_memory

# Copied in 0.2 ms: gRPC's own copies of it hold up the event loop for longer. Threads would share the work, but handing
# it over and hearing of its end takes as much of the processor again.
QUICK_BYTES = 2 << 20


@dataclass(frozen=True, eq=False)
class Cells:
    """Some cells of a pool: K and V of these layers and sequence positions, by a block table.

    Their payload is the bytes of [layers, 2, tokens, K, D].
    """

    # [L, 2, N, P, K, D], see kv_transfer/frames/layout.py.
    pool: Tensor
    # The sequence's block table.
    blocks: Sequence[int]
    layers: range
    tokens: range

    def pieces(self) -> Runs:
        """The payload where it lies; on cpu that is the pool itself, so it must be used before that changes."""
        if self.pool.device.type != "cpu":
            with device_memory():
                # As bytes: numpy does not know bfloat16.
                return Runs.of(to_host(self.gather_slots()).detach().view(torch.uint8).numpy())
        return self._places()

    def scatter(self, payload: bytes | memoryview) -> int:
        """Writes a payload into the pool; returns its crc32 when the pool's device has it."""
        if self.pool.device.type != "cpu":
            with device_memory():
                self.scatter_slots(payload)
                torch.cuda.current_stream(self.pool.device).synchronize()
            return crc32(payload)
        return self.copy_from(Runs.of(payload))

    def copy_from(self, payload: Runs) -> int:
        """Writes a payload that lies in pieces into a pool on cpu; returns its crc32."""
        return payload.copy_to(self._places(), checked=True, streamed=True)

    def gather_slots(self) -> Tensor:
        """The payload as one tensor [layers, 2, tokens, K * D] on the pool's device: one kernel."""
        return self._slot_view().index_select(2, self._slots())

    def scatter_slots(self, payload: bytes | memoryview) -> None:
        """Writes a payload into a pool on any device: one copy to the device, one kernel."""
        staged = to_device(np.frombuffer(payload, dtype=np.uint8), self.pool.device).view(self.pool.dtype)
        self.write_slots(staged.view(len(self.layers), 2, len(self.tokens), -1))

    def write_slots(self, values: Tensor) -> None:
        """Writes values [layers, 2, tokens, K * D] of the pool's dtype and device into it: one kernel."""
        self._slot_view().index_copy_(2, self._slots(), values)

    def _places(self) -> Runs:
        """On cpu: a piece for each layer, K or V, and block.

        Raises IndexError for cells outside the pool or the table: what is done to them is not checked again.
        """
        assert self.pool.device.type == "cpu", "these addresses are read and written by this process"
        num_layers, _, num_blocks, block_size, heads, width = self.pool.shape
        block_bytes = block_size * heads * width * self.pool.element_size()
        planes = Planes(self.pool, self.pool.data_ptr(), num_layers, num_blocks, block_bytes)
        named = blocks_of(self.tokens, block_size)
        table = self.blocks[named.start : named.stop]
        if len(table) < len(named):
            raise IndexError("KV cells outside of the block table")
        slot_bytes = block_bytes // block_size
        before = (self.tokens.start - named.start * block_size) * slot_bytes
        after = (named.stop * block_size - self.tokens.stop) * slot_bytes
        return Runs.of_blocks(planes, table, self.layers, before, after)

    def _slot_view(self) -> Tensor:
        return self.pool.flatten(4).flatten(2, 3)[self.layers.start : self.layers.stop]

    def _slots(self) -> Tensor:
        spans = slot_spans(self.blocks, self.tokens, self.pool.shape[3])
        slots = np.concatenate([np.arange(slot, slot + count) for slot, count in spans])
        return to_device(slots, self.pool.device)


class Native:
    """Payloads of one layout in the pool's own bytes, and the base of what moves them in other numbers. Copies run in a
    thread, but for quick ones.
    """

    name = "native"

    def __init__(self, layout: KVLayout) -> None:
        self._layout = layout

    @property
    def cell_bytes(self) -> int:
        """K and V of one token in one layer take no more than this."""
        return self.payload_bytes(1, range(1))

    def payload_bytes(self, layers: int, tokens: range) -> int:
        """Exactly. `tokens` are sequence positions: where blocks begin may matter."""
        return self._layout.payload_bytes(layers, len(tokens))

    def is_quick(self, cells: Cells) -> bool:
        """Whether a copy of these cells may be made in the event loop: it takes a fraction of a millisecond."""
        return cells.pool.device.type == "cpu" and self.payload_bytes(len(cells.layers), cells.tokens) <= QUICK_BYTES

    def pieces(self, cells: Cells) -> Runs:
        """The payload where it lies, to be used before the pool changes.

        Raises Refused for KV that these numbers cannot hold.
        """
        return cells.pieces()

    def scatter(self, cells: Cells, payload: bytes | memoryview, checksum: int) -> bool:
        """Writes a payload of `payload_bytes` into the cells; returns when the pool's device has it.

        False if `checksum` is not its crc32: then the cells may hold anything. Raises TransferFailed, and has written
        nothing, for an intact one that no sender makes.
        """
        return cells.scatter(payload) == checksum  # verified in the pass that copies


def to_host(tensor: Tensor) -> Tensor:
    """Contiguous. From a GPU by way of pinned memory, ten times as fast as without; waits for the copy."""
    if tensor.device.type != "cuda":
        return tensor.cpu().contiguous()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return host


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """To a GPU by way of pinned memory, which torch keeps until the copy is over; nobody waits."""
    dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
    host = torch.empty(array.shape, dtype=dtype, pin_memory=device.type == "cuda")
    host.numpy()[...] = array
    return host.to(device, non_blocking=True)


@contextmanager
def device_memory() -> Iterator[None]:
    """Around what needs memory on the pool's device beside the pool. Raises TransferFailed when there is none."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        torch.cuda.empty_cache()
        raise TransferFailed("the device of the KV pool has no memory left for a KV frame") from None


def slot_spans(blocks: Sequence[int], tokens: range, block_size: int) -> Iterator[tuple[int, int]]:
    """(first slot, count) of each block's share of the positions; the first and the last may be partial."""
    token = tokens.start
    while token < tokens.stop:
        offset = token % block_size
        count = min(block_size - offset, tokens.stop - token)
        yield blocks[token // block_size] * block_size + offset, count
        token += count
