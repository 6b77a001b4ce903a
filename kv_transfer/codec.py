"""The frames of a transfer: fixed prelude, msgpack header, raw payload. Nothing is ever unpickled.

    magic 4 | version 2 | header length 2 | crc32 of all three and the header 4 | header | payload

    open → data* → seal (or abandon) from the sender; done is the receiver's answer.

Where both ends reach one object store, `placed` stands for `data`: the payload lies there, and the frame has only its
place; the receiver answers each with `taken` before it is done. Where the sender can write into the receiver's pool,
`written` stands for it: the payload is in its blocks already. The receiver has said before which they are (`mapped`),
the sender that it holds their lock (`locked`), and the receiver that it may write (`granted`). By NIXL, the sender says
who it is (`writer`), and the receiver which blocks it may write (`lent`). A writer by NIXL whose transfer ended
otherwise than by a seal says in a call of its own that it writes no more (`released`).

A flipped bit before the payload fails the prelude's crc32, one in the payload fails the header's. Headers are checked
against a closed schema (every key, its type, its range); no size in them is used to allocate anything.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgpack

from kv_transfer.checksum import crc32
from kv_transfer.messages import (
    Abandon,
    Data,
    Done,
    Granted,
    Lent,
    Locked,
    Mapped,
    Message,
    Open,
    Placed,
    Released,
    Seal,
    Taken,
    Writer,
    Written,
)
from kv_transfer.runs import Runs
from tandem.errors import Refused, TransferFailed
from tandem.types import Fingerprint

VERSION = 3
# Frames are cut to at most 16 MiB of payload (config: worker.frame_bytes).
MAX_PAYLOAD_BYTES = 1 << 24
# Fits the longest texts that the schemas allow.
MAX_HEADER_BYTES = 4096
MAX_PLACE_BYTES = 512
# A host of many network cards has an address on each.
MAX_METADATA_BYTES = 1 << 16
BLOCK_ID_BYTES = 4
CHECKSUM_BYTES = 4
_MAGIC = b"TKVF"
_PRELUDE = struct.Struct(">4sHHI")
_UNGUARDED = struct.Struct(">4sHH")
MAX_FRAME_BYTES = _PRELUDE.size + MAX_HEADER_BYTES + MAX_PAYLOAD_BYTES


class CorruptFrame(TransferFailed):
    """The bytes are not those that were sent. Peers are told what TransferFailed tells."""


@dataclass(frozen=True)
class _Whole:
    low: int
    high: int

    def allows(self, value: object) -> bool:
        return type(value) is int and self.low <= value <= self.high

    def __str__(self) -> str:
        return f"a whole number in [{self.low}, {self.high}]"


@dataclass(frozen=True)
class _Text:
    most: int

    def allows(self, value: object) -> bool:
        return isinstance(value, str) and 0 < len(value) <= self.most

    def __str__(self) -> str:
        return f"text of 1 to {self.most} characters"


@dataclass(frozen=True)
class _Bytes:
    most: int
    least: int = 1

    def allows(self, value: object) -> bool:
        return isinstance(value, bytes) and self.least <= len(value) <= self.most

    def __str__(self) -> str:
        return f"{self.least} to {self.most} bytes" if self.least < self.most else f"{self.most} bytes"


_CHECKSUM = _Whole(0, 2**32 - 1)
_COUNT, _SIZE, _ID = _Whole(0, 2**31 - 1), _Whole(0, 2**53), _Text(128)
# As it travels: of one length, so that a header's does not depend on it.
_CRC = _Bytes(CHECKSUM_BYTES, CHECKSUM_BYTES)
_POSITIVE = _Whole(1, 2**31 - 1)
_Limit = _Whole | _Text | _Bytes
_Schema = Mapping[str, _Limit]
_FINGERPRINT: _Schema = {
    "config_hash": _ID,
    "weights_hash": _ID,
    "dtype": _ID,
    "block_size": _POSITIVE,
    "num_layers": _POSITIVE,
    "num_kv_heads": _POSITIVE,
    "head_dim": _POSITIVE,
    "layout": _COUNT,
}
_OPEN: _Schema = {
    "reservation_id": _ID,
    "request_id": _ID,
    "attempt": _COUNT,
    "token_start": _COUNT,
    "token_stop": _POSITIVE,
    "wire_dtype": _ID,
    **_FINGERPRINT,
}
_DATA: _Schema = {
    "sequence": _COUNT,
    "layer_start": _COUNT,
    "layer_count": _POSITIVE,
    "token_start": _COUNT,
    "token_count": _POSITIVE,
    "payload_bytes": _Whole(1, MAX_PAYLOAD_BYTES),
    "checksum": _CRC,
}
_PLACED: _Schema = {**_DATA, "object_id": _Bytes(MAX_PLACE_BYTES), "owner": _Bytes(MAX_PLACE_BYTES)}
_MAPPED: _Schema = {
    "pid": _POSITIVE,
    "fd": _COUNT,
    "memory_id": _ID,
    "memory_bytes": _SIZE,
    "pool_blocks": _POSITIVE,
    "block_count": _POSITIVE,
    "checksum": _CRC,
}
_LENT: _Schema = {
    "agent_id": _ID,
    "address": _SIZE,
    "memory": _ID,
    "device": _COUNT,
    "pool_blocks": _POSITIVE,
    "metadata_bytes": _Whole(1, MAX_METADATA_BYTES),
    "block_count": _POSITIVE,
    "checksum": _CRC,
}
_WRITER: _Schema = {"writer_id": _ID}
_RELEASED: _Schema = {"reservation_id": _ID}
_EMPTY: _Schema = {}
_SEAL: _Schema = {"first_token": _COUNT, "frames": _COUNT, "bytes": _SIZE, "checksum": _CRC}
_TAKEN: _Schema = {"sequence": _COUNT}
_DONE: _Schema = {"frames": _COUNT, "bytes": _SIZE}


def _open_from(fields: dict[str, Any]) -> Open:
    fingerprint = Fingerprint(**{name: fields.pop(name) for name in _FINGERPRINT})
    return Open(fingerprint=fingerprint, **fields)


_KINDS: dict[str, tuple[_Schema, Callable[[dict[str, Any]], Message]]] = {
    "open": (_OPEN, _open_from),
    "data": (_DATA, lambda fields: Data(**fields)),
    "placed": (_PLACED, lambda fields: Placed(**fields)),
    "written": (_DATA, lambda fields: Written(**fields)),
    "mapped": (_MAPPED, lambda fields: Mapped(**fields)),
    "locked": (_EMPTY, lambda fields: Locked()),
    "granted": (_EMPTY, lambda fields: Granted()),
    "writer": (_WRITER, lambda fields: Writer(**fields)),
    "lent": (_LENT, lambda fields: Lent(**fields)),
    "released": (_RELEASED, lambda fields: Released(**fields)),
    "seal": (_SEAL, lambda fields: Seal(**fields)),
    "abandon": (_EMPTY, lambda fields: Abandon()),
    "taken": (_TAKEN, lambda fields: Taken(**fields)),
    "done": (_DONE, lambda fields: Done(**fields)),
}


def encode(message: Message, payload: bytes = b"") -> bytes:
    """One frame, with a small payload if it has one (see frame_of for others).

    Raises TransferFailed for a field that decode would refuse.
    """
    return _guarded(_header(message)) + payload


def frame_of(sequence: int, layers: range, tokens: range, payload: Runs) -> tuple[Data, bytes]:
    """A data frame, and what its header says. The payload is read once, for its checksum and its copy."""
    data = Data.of_ranges(sequence, layers, tokens, payload.nbytes, checksum=0)
    header = _header(data)
    rest, room = header[:-CHECKSUM_BYTES], _PRELUDE.size + len(header)  # the checksum is a data frame's last field
    frame, crc = payload.after(room, lambda crc: _guarded(rest + crc.to_bytes(CHECKSUM_BYTES)))
    return replace(data, checksum=crc), frame


def decode(frame: bytes) -> tuple[Message, memoryview]:
    """The header and the payload. That of a data frame must still be verified, by whoever copies it.

    Raises TransferFailed for anything malformed, Refused for an intact frame of another version.
    """
    if not _PRELUDE.size <= len(frame) <= MAX_FRAME_BYTES:
        raise TransferFailed(f"a KV frame of {len(frame)} bytes is not in [{_PRELUDE.size}, {MAX_FRAME_BYTES}]")
    magic, version, length, guard = _PRELUDE.unpack_from(frame)
    if magic != _MAGIC:
        raise CorruptFrame("the bytes are not a KV frame")
    if length > MAX_HEADER_BYTES or len(frame) < _PRELUDE.size + length:
        raise CorruptFrame(f"a KV frame's header of {length} bytes is too long or cut short")
    whole = memoryview(frame)
    header, payload = whole[_PRELUDE.size : _PRELUDE.size + length], whole[_PRELUDE.size + length :]
    if crc32(header, crc32(whole[: _UNGUARDED.size])) != guard:
        raise CorruptFrame("a KV frame's header fails its checksum")
    if version != VERSION:
        raise Refused(f"the peer sends KV frames of version {version}, this worker takes version {VERSION}")
    message = _parse(header)
    expected = _payload_of(message)
    if len(payload) != expected:
        raise TransferFailed(f"a KV frame carries {len(payload)} bytes where its header says {expected}")
    if isinstance(message, Mapped | Lent) and crc32(payload) != message.checksum:
        raise CorruptFrame("the block ids of a KV frame fail their checksum")
    return message, payload


def chain_checksum(chain: int, data: Data) -> int:
    """The running checksum of checksums after one more frame; starts from 0."""
    return crc32(data.checksum.to_bytes(CHECKSUM_BYTES), chain)


def _header(message: Message) -> bytes:
    kind, fields = type(message).__name__.lower(), dict(vars(message))
    if isinstance(message, Open):
        fields.update(vars(fields.pop("fingerprint")))
    if "checksum" in fields:
        _check_field(kind, "checksum", _CHECKSUM, fields["checksum"])
        fields["checksum"] = fields["checksum"].to_bytes(CHECKSUM_BYTES)
    _check(kind, fields)
    header: bytes = msgpack.packb({"kind": kind, **fields})
    return header


def _guarded(header: bytes) -> bytes:
    """Behind its prelude."""
    guard = crc32(header, crc32(_UNGUARDED.pack(_MAGIC, VERSION, len(header))))
    return _PRELUDE.pack(_MAGIC, VERSION, len(header), guard) + header


def _payload_of(message: Message) -> int:
    """Bytes that follow the header."""
    if isinstance(message, Mapped):
        return BLOCK_ID_BYTES * message.block_count
    if isinstance(message, Lent):
        return message.metadata_bytes + BLOCK_ID_BYTES * message.block_count
    return message.payload_bytes if type(message) is Data else 0


def _parse(header: memoryview) -> Message:
    try:
        fields = msgpack.unpackb(
            header,
            object_hook=_flat,
            strict_map_key=True,
            max_str_len=MAX_HEADER_BYTES,
            max_bin_len=MAX_PLACE_BYTES,
            max_array_len=0,
            max_map_len=32,
            max_ext_len=0,
        )
    except (ValueError, msgpack.UnpackException) as error:
        raise TransferFailed(f"a KV frame's header is not readable: {type(error).__name__} {error!s:.80}") from None
    kind = fields.pop("kind", None) if isinstance(fields, dict) else None
    if not isinstance(kind, str) or kind not in _KINDS:
        raise TransferFailed(f"a KV frame of kind {str(kind)[:20]!r} is unknown")
    _check(kind, fields)
    if "checksum" in fields:
        fields["checksum"] = int.from_bytes(fields["checksum"])
    return _KINDS[kind][1](fields)


def _flat(fields: dict[str, Any]) -> dict[str, Any]:
    """A header has room for maps a thousand deep, which Python cannot even write into a message."""
    if any(isinstance(value, dict) for value in fields.values()):
        raise ValueError("a map lies in a map")
    return fields


def _check(kind: str, fields: dict[str, Any]) -> None:
    schema = _KINDS[kind][0]
    if fields.keys() != schema.keys():
        odd = ", ".join(sorted(f"{key!r:.20}" for key in fields.keys() ^ schema.keys())[:4])
        raise TransferFailed(f"a KV frame's {kind} header has missing or unknown keys: {odd}")
    for name, limit in schema.items():
        _check_field(kind, name, limit, fields[name])


def _check_field(kind: str, name: str, limit: _Limit, value: object) -> None:
    if not limit.allows(value):
        raise TransferFailed(f"{name} in a KV frame's {kind} header must be {limit}, not {value!r:.40}")
