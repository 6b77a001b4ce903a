"""What the ends of a transfer through shared memory say beside what all say."""

from __future__ import annotations

from kv_transfer.frames.messages import BlockList, Checksum, Count, Id, KVMessage, Positive, Size, message


@message("mapped")
class Mapped(BlockList):
    """The receiver's pool is memory that the sender can map. The payload names the blocks that may be written."""

    # The process, and the memory in it: /proc/PID/fd/FD.
    pid: Positive
    fd: Count
    # Chosen by the process; the memory's name holds it.
    memory_id: Id
    memory_bytes: Size
    pool_blocks: Positive
    block_count: Positive
    checksum: Checksum


@message("locked")
class Locked(KVMessage):
    """The sender holds the lock of the mapped blocks, and writes nothing before it is granted."""


@message("granted")
class Granted(KVMessage):
    """The blocks are the sender's to write until it lets go of their lock."""
