"""In which numbers KV travels: an option of whatever carries payloads, and the sender's to choose.

    native   the pool's own bytes; what arrives is what was sent
    int8     a quarter of float32's bytes, half of the others'; lossy (kv_transfer/int8.py)

The open frame says which, and both ends make it from their own layout. Transports that move no payload (`local`) have
no use for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from kv_transfer.cells import Cells
from kv_transfer.int8 import Int8
from kv_transfer.layout import KVLayout
from kv_transfer.runs import Runs
from tandem.errors import Refused

# Copied in 0.2 ms: gRPC's own copies of it hold up the event loop for longer. Threads would share the work, but handing
# it over and hearing of its end takes as much of the processor again.
QUICK_BYTES = 2 << 20


class WireDtype(Protocol):
    """Payloads of one layout. Copies run in a thread, but for quick ones."""

    @property
    def name(self) -> str: ...

    @property
    def cell_bytes(self) -> int:
        """K and V of one token in one layer take no more than this."""

    def payload_bytes(self, layers: int, tokens: range) -> int:
        """Exactly. `tokens` are sequence positions: where blocks begin may matter."""

    def is_quick(self, cells: Cells) -> bool:
        """Whether a copy of these cells may be made in the event loop: it takes a fraction of a millisecond."""

    def pieces(self, cells: Cells) -> Runs:
        """The payload where it lies, to be used before the pool changes.

        Raises Refused for KV that these numbers cannot hold.
        """

    def scatter(self, cells: Cells, payload: bytes | memoryview, checksum: int) -> bool:
        """Writes a payload of `payload_bytes` into the cells; returns when the pool's device has it.

        False if `checksum` is not its crc32: then the cells may hold anything. Raises TransferFailed, and has written
        nothing, for an intact one that no sender makes.
        """


class Native:
    """The pool's own bytes: see Cells."""

    name = "native"

    def __init__(self, layout: KVLayout) -> None:
        self._layout = layout

    @property
    def cell_bytes(self) -> int:
        """See WireDtype."""
        return self._layout.payload_bytes(1, 1)

    def payload_bytes(self, layers: int, tokens: range) -> int:
        """See WireDtype."""
        return self._layout.payload_bytes(layers, len(tokens))

    def is_quick(self, cells: Cells) -> bool:
        """See WireDtype."""
        return cells.pool.device.type == "cpu" and self.payload_bytes(len(cells.layers), cells.tokens) <= QUICK_BYTES

    def pieces(self, cells: Cells) -> Runs:
        """See WireDtype."""
        return cells.pieces()

    def scatter(self, cells: Cells, payload: bytes | memoryview, checksum: int) -> bool:
        """See WireDtype. Copies and verifies in one pass."""
        return cells.scatter(payload) == checksum


# What `worker.wire_dtype` may say, and what a receiver takes.
WIRE_DTYPES: Mapping[str, Callable[[KVLayout], WireDtype]] = {Native.name: Native, Int8.name: Int8}


def wire_dtype(name: str, layout: KVLayout) -> WireDtype:
    """Raises Refused for a name that this worker does not know."""
    if name not in WIRE_DTYPES:
        raise Refused(f"KV in wire dtype {name[:20]!r} is unknown to this worker; it takes {', '.join(WIRE_DTYPES)}")
    return WIRE_DTYPES[name](layout)
