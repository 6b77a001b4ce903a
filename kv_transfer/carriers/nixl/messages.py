"""What the ends of a transfer by NIXL say beside what all say."""

from __future__ import annotations

from typing import Annotated

from kv_transfer.frames.messages import BlockList, Checksum, Count, Id, KVMessage, Limit, Positive, Size, message

# A host of many network cards has an address on each.
MAX_METADATA_BYTES = 1 << 16


@message("writer")
class WriterName(KVMessage):
    """Which process asks for blocks to write into."""

    # Chosen by the process.
    writer_id: Id


@message("lent")
class Lent(BlockList):
    """Blocks that the writer may write into from now on. The payload: an agent's metadata, then block ids."""

    # The receiver's agent for this writer.
    agent_id: Id
    # Where the pool begins, and in what: "cpu" or "cuda", the index of the device.
    address: Size
    memory: Id
    device: Count
    pool_blocks: Positive
    metadata_bytes: Annotated[int, Limit(int, 1, MAX_METADATA_BYTES)]
    block_count: Positive
    checksum: Checksum

    @property
    def carried_bytes(self) -> int:
        return self.metadata_bytes + super().carried_bytes


@message("released")
class Released(KVMessage):
    """The writer of a transfer that was not sealed has written its last."""

    reservation_id: Id
