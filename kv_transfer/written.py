"""What receiving ends have in common whose sender writes into the reserved blocks itself.

They name the blocks, of all positions that travel and of no others, and verify what they are told was written where it
lies.
"""

from __future__ import annotations

import struct

from kv_transfer.base import Landing
from kv_transfer.cells import Cells
from kv_transfer.codec import CorruptFrame
from kv_transfer.layout import blocks_of
from kv_transfer.messages import Data, Written
from kv_transfer.wire_dtype import WireDtype


class WrittenIntake:
    """Payloads are in the pool before their frames come. The rest of an Intake is how that may be."""

    kind: type[Data] = Written

    async def fetch(self, data: Data, payload: memoryview) -> memoryview:
        """See Intake."""
        return payload

    def land(self, cells: Cells, wire: WireDtype, data: Data, payload: memoryview) -> None:
        """See Intake. Nothing moves."""
        if cells.pieces().checksum() != data.checksum:
            raise CorruptFrame(f"the payload of KV frame {data.sequence} fails its checksum")

    async def taken(self, data: Data) -> None:
        """See Intake."""


def block_ids(landing: Landing, tokens: range) -> tuple[list[int], bytes]:
    """The blocks that these positions lie in, and the same as a payload."""
    blocks = [landing.blocks[entry] for entry in blocks_of(tokens, landing.pool.shape[3])]
    return blocks, struct.pack(f">{len(blocks)}I", *blocks)
