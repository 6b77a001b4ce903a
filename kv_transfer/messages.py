"""What the two ends of a transfer say to each other: a frame's header is one of these."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Self

from tandem.types import Fingerprint


@dataclass(frozen=True)
class Open:
    """First frame: whose KV this is, of which model, and the positions that will travel."""

    reservation_id: str
    request_id: str
    attempt: int
    fingerprint: Fingerprint
    token_start: int
    token_stop: int
    # How payloads are to be read: a name of kv_transfer/wire_dtype.py.
    wire_dtype: str

    @property
    def tokens(self) -> range:
        return range(self.token_start, self.token_stop)


@dataclass(frozen=True)
class Data:
    """KV of some positions in some layers; the payload follows."""

    # 0, 1, 2, ... within a transfer.
    sequence: int
    layer_start: int
    layer_count: int
    token_start: int
    token_count: int
    payload_bytes: int
    # crc32 of the payload.
    checksum: int

    @classmethod
    def of_ranges(cls, sequence: int, layers: range, tokens: range, payload_bytes: int, checksum: int) -> Self:
        return cls(sequence, layers.start, len(layers), tokens.start, len(tokens), payload_bytes, checksum)

    @property
    def layers(self) -> range:
        return range(self.layer_start, self.layer_start + self.layer_count)

    @property
    def tokens(self) -> range:
        return range(self.token_start, self.token_start + self.token_count)


@dataclass(frozen=True)
class Place:
    """Where a payload lies in an object store; what the bytes mean, and whether they do, is the store's to say."""

    object_id: bytes
    # The process that holds the object for as long as the transfer needs it.
    owner: bytes


@dataclass(frozen=True)
class Placed(Data):
    """KV like a data frame's, but the payload lies in an object store."""

    object_id: bytes
    owner: bytes

    @classmethod
    def of(cls, data: Data, place: Place) -> Placed:
        return cls(**asdict(data), **asdict(place))

    @property
    def place(self) -> Place:
        return Place(self.object_id, self.owner)


@dataclass(frozen=True)
class Written(Data):
    """KV like a data frame's, but the sender has put the payload into the receiver's pool itself."""


@dataclass(frozen=True)
class Mapped:
    """The receiver's pool is memory that the sender can map. The payload names the blocks that may be written."""

    # Of the process, and of the memory in it: /proc/PID/fd/FD.
    pid: int
    fd: int
    # Chosen by the process; the memory's name holds it.
    memory_id: str
    memory_bytes: int
    # The pool has so many blocks.
    pool_blocks: int
    # The payload is so many block ids, big-endian, 4 bytes each: of all positions that travel.
    block_count: int
    # crc32 of the payload: a wrong id would have others' blocks written.
    checksum: int


@dataclass(frozen=True)
class Locked:
    """The sender holds the lock of the mapped blocks, and writes nothing before it is granted."""


@dataclass(frozen=True)
class Writer:
    """Which process asks for blocks to write into, by NIXL."""

    # Chosen by the process.
    writer_id: str


@dataclass(frozen=True)
class Lent:
    """Blocks that the writer may write into from now on, by NIXL. The payload: an agent's metadata, then block ids."""

    # The receiver's agent for this writer.
    agent_id: str
    # Where the pool begins, and in what: "cpu" or "cuda", the index of the device.
    address: int
    memory: str
    device: int
    # The pool has so many blocks.
    pool_blocks: int
    metadata_bytes: int
    # So many block ids, big-endian, 4 bytes each: of all positions that travel.
    block_count: int
    # crc32 of the payload: a wrong id would have others' blocks written.
    checksum: int


@dataclass(frozen=True)
class Released:
    """Of a transfer that was not sealed: its writer has written its last."""

    reservation_id: str


@dataclass(frozen=True)
class Granted:
    """The blocks are the sender's to write until it lets go of their lock."""


@dataclass(frozen=True)
class Seal:
    """Last frame: the first token, and totals over the data frames."""

    first_token: int
    frames: int
    # Of payload.
    bytes: int
    # chain_checksum over the data frames in order.
    checksum: int


@dataclass(frozen=True)
class Abandon:
    """Last frame in the seal's place: nobody needs the KV any more."""


@dataclass(frozen=True)
class Taken:
    """The receiver has written the payload of a placed frame: nobody needs the object any more."""

    sequence: int


@dataclass(frozen=True)
class Done:
    """The receiver verified and took the KV, or gave back the blocks of an abandoned transfer."""

    frames: int
    bytes: int


Message = (
    Open
    | Data
    | Placed
    | Written
    | Mapped
    | Locked
    | Granted
    | Writer
    | Lent
    | Released
    | Seal
    | Abandon
    | Taken
    | Done
)
