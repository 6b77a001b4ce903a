"""What the two ends of a transfer say to each other: a frame's header is one of these.

A message is a class under `@message(kind)`: its fields are the header's keys, and their annotations say what each may
be. What belongs to one carrier stands in the carrier's folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, Self, TypeVar, dataclass_transform, get_type_hints

from tandem.types import Fingerprint

# Frames are cut to at most 16 MiB of payload (config: worker.frame_bytes).
MAX_PAYLOAD_BYTES = 1 << 24
# Bytes in a header, under one key.
MAX_OCTETS = 512
BLOCK_ID_BYTES = 4
CHECKSUM_BYTES = 4


@dataclass(frozen=True)
class Limit:
    """The range of a whole number, or of the length of text or bytes."""

    kind: type[int] | type[str] | type[bytes]
    low: int
    high: int

    def allows(self, value: Any) -> bool:
        right_kind = type(value) is self.kind
        return right_kind and self.low <= (value if self.kind is int else len(value)) <= self.high

    def __str__(self) -> str:
        if self.kind is int:
            return f"a whole number in [{self.low}, {self.high}]"
        size = f"{self.low} to {self.high}" if self.low < self.high else f"{self.high}"
        return f"text of {size} characters" if self.kind is str else f"{size} bytes"


Count = Annotated[int, Limit(int, 0, 2**31 - 1)]
Positive = Annotated[int, Limit(int, 1, 2**31 - 1)]
Size = Annotated[int, Limit(int, 0, 2**53)]
Id = Annotated[str, Limit(str, 1, 128)]
# Travels as 4 bytes: so that the length of a header does not depend on it.
Checksum = Annotated[int, Limit(bytes, CHECKSUM_BYTES, CHECKSUM_BYTES)]


class _FingerprintKeys:
    """Travels flat, its fields among those of the header."""

    config_hash: Id
    weights_hash: Id
    dtype: Id
    block_size: Positive
    num_layers: Positive
    num_kv_heads: Positive
    head_dim: Positive
    layout: Count


class KVMessage:
    """Says something, and may have a payload."""

    # The frame's.
    kind: ClassVar[str]

    @property
    def carried_bytes(self) -> int:
        """Bytes that follow the header."""
        return 0


class BlockList(KVMessage):
    """Names blocks to write into; its payload ends with their ids, big-endian, 4 bytes each: of all positions that
    travel. A wrong one would have others' blocks written, so the payload is verified before it is looked at.
    """

    # The pool has so many blocks.
    pool_blocks: int
    block_count: int
    # crc32 of the payload.
    checksum: int

    @property
    def carried_bytes(self) -> int:
        return BLOCK_ID_BYTES * self.block_count


M = TypeVar("M", bound=KVMessage)
# Each kind's class, and what its header's keys may be. Closed: a frame of another kind, or with other keys, is refused.
KINDS: dict[str, tuple[type[KVMessage], Mapping[str, Limit]]] = {}


@dataclass_transform(frozen_default=True)
def message(kind: str) -> Callable[[type[M]], type[M]]:
    """Makes a class a frozen dataclass, and a kind of frame."""
    assert kind not in KINDS, f"two messages are called {kind}"

    def make(cls: type[M]) -> type[M]:
        made, hints = dataclass(frozen=True)(cls), get_type_hints(cls, include_extras=True)
        keys = {field.name: hints[field.name] for field in fields(made)}  # type: ignore[arg-type]
        if keys.pop("fingerprint", None) is not None:
            keys |= get_type_hints(_FingerprintKeys, include_extras=True)
        made.kind = kind
        KINDS[kind] = made, {name: hint.__metadata__[0] for name, hint in keys.items()}
        return made

    return make


@message("open")
class Open(KVMessage):
    """First frame: whose KV this is, of which model, and the positions that will travel."""

    reservation_id: Id
    request_id: Id
    attempt: Count
    fingerprint: Fingerprint
    token_start: Count
    token_stop: Positive
    # How payloads are to be read: a name of kv_transfer/frames/wire_dtype.py.
    wire_dtype: Id

    @property
    def tokens(self) -> range:
        return range(self.token_start, self.token_stop)


@message("data")
class Data(KVMessage):
    """KV of some positions in some layers; the payload follows."""

    # 0, 1, 2, ... within a transfer.
    sequence: Count
    layer_start: Count
    layer_count: Positive
    token_start: Count
    token_count: Positive
    payload_bytes: Annotated[int, Limit(int, 1, MAX_PAYLOAD_BYTES)]
    # crc32 of the payload.
    checksum: Checksum

    @classmethod
    def of_ranges(cls, sequence: int, layers: range, tokens: range, payload_bytes: int, checksum: int) -> Self:
        return cls(sequence, layers.start, len(layers), tokens.start, len(tokens), payload_bytes, checksum)

    @property
    def carried_bytes(self) -> int:
        """See KVMessage. Of the kinds derived from this one, the payload goes another way."""
        return self.payload_bytes if type(self) is Data else 0

    @property
    def layers(self) -> range:
        return range(self.layer_start, self.layer_start + self.layer_count)

    @property
    def tokens(self) -> range:
        return range(self.token_start, self.token_start + self.token_count)


@message("written")
class Written(Data):
    """KV like a data frame's, but the sender has put the payload into the receiver's pool itself."""


@message("seal")
class Seal(KVMessage):
    """Last frame: the first token, and totals over the data frames."""

    first_token: Count
    frames: Count
    # Sum of the payloads.
    bytes: Size
    # chain_checksum over the data frames in order.
    checksum: Checksum


@message("abandon")
class Abandon(KVMessage):
    """Last frame in the seal's place: nobody needs the KV any more."""


@message("done")
class Done(KVMessage):
    """The receiver verified and took the KV, or gave back the blocks of an abandoned transfer."""

    frames: Count
    bytes: Size
