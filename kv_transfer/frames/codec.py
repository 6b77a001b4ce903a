"""The frames of a transfer: fixed prelude, msgpack header, raw payload. Nothing is ever unpickled.

    magic 4 | version 2 | header length 2 | crc32 of all three and the header 4 | header | payload

    open → data* → seal (or abandon) from the sender; done is the receiver's answer.

A carrier may have another kind in the place of `data`, and more that its ends say to each other before or meanwhile.

A flipped bit before the payload fails the prelude's crc32, one in the payload fails the header's. Headers are checked
against a closed schema (`KINDS`: every key, its type, its range); no size in them is used to allocate anything.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import msgpack

from kv_transfer.frames.messages import (
    CHECKSUM_BYTES,
    KINDS,
    MAX_OCTETS,
    MAX_PAYLOAD_BYTES,
    BlockList,
    Data,
    KVMessage,
    Limit,
    Open,
)
from kv_transfer.frames.runs import Runs, crc32
from tandem.errors import Refused, TransferFailed
from tandem.types import Fingerprint

VERSION = 3
# Fits the longest texts that the schemas allow.
MAX_HEADER_BYTES = 4096
_MAGIC = b"TKVF"
_PRELUDE = struct.Struct(">4sHHI")
_UNGUARDED = struct.Struct(">4sHH")
MAX_FRAME_BYTES = _PRELUDE.size + MAX_HEADER_BYTES + MAX_PAYLOAD_BYTES
_CRC32 = Limit(int, 0, 2**32 - 1)
_FINGERPRINT = Fingerprint.__dataclass_fields__


class CorruptFrame(TransferFailed):
    """The bytes are not those that were sent. Peers are told what TransferFailed tells."""


def encode(message: KVMessage, payload: bytes = b"") -> bytes:
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


def decode(frame: bytes) -> tuple[KVMessage, memoryview]:
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
    if len(payload) != message.carried_bytes:
        raise TransferFailed(f"a KV frame carries {len(payload)} bytes where its header says {message.carried_bytes}")
    if isinstance(message, BlockList) and crc32(payload) != message.checksum:
        raise CorruptFrame("the block ids of a KV frame fail their checksum")
    return message, payload


def chain_checksum(chain: int, data: Data) -> int:
    """The running checksum of checksums after one more frame; starts from 0."""
    return crc32(data.checksum.to_bytes(CHECKSUM_BYTES), chain)


def _header(message: KVMessage) -> bytes:
    kind, fields = message.kind, dict(vars(message))
    if isinstance(message, Open):
        fields.update(vars(fields.pop("fingerprint")))
    if "checksum" in fields:
        _check_field(kind, "checksum", _CRC32, fields["checksum"])
        fields["checksum"] = fields["checksum"].to_bytes(CHECKSUM_BYTES)
    _check(kind, fields)
    header: bytes = msgpack.packb({"kind": kind, **fields})
    return header


def _guarded(header: bytes) -> bytes:
    """Behind its prelude."""
    guard = crc32(header, crc32(_UNGUARDED.pack(_MAGIC, VERSION, len(header))))
    return _PRELUDE.pack(_MAGIC, VERSION, len(header), guard) + header


def _parse(header: memoryview) -> KVMessage:
    try:
        fields = msgpack.unpackb(
            header,
            object_hook=_flat,
            strict_map_key=True,
            max_str_len=MAX_HEADER_BYTES,
            max_bin_len=MAX_OCTETS,
            max_array_len=0,
            max_map_len=32,
            max_ext_len=0,
        )
    except (ValueError, msgpack.UnpackException) as error:
        raise TransferFailed(f"a KV frame's header is not readable: {type(error).__name__} {error!s:.80}") from None
    kind = fields.pop("kind", None) if isinstance(fields, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise TransferFailed(f"a KV frame of kind {str(kind)[:20]!r} is unknown")
    _check(kind, fields)
    if "checksum" in fields:
        fields["checksum"] = int.from_bytes(fields["checksum"])
    if kind == "open":
        fields["fingerprint"] = Fingerprint(**{name: fields.pop(name) for name in _FINGERPRINT})
    return KINDS[kind][0](**fields)


def _flat(fields: dict[str, Any]) -> dict[str, Any]:
    """A header has room for maps a thousand deep, which Python cannot even write into a message."""
    if any(isinstance(value, dict) for value in fields.values()):
        raise ValueError("a map lies in a map")
    return fields


def _check(kind: str, fields: dict[str, Any]) -> None:
    _, limits = KINDS[kind]
    if fields.keys() != limits.keys():
        odd = ", ".join(sorted(f"{key!r:.20}" for key in fields.keys() ^ limits.keys())[:4])
        raise TransferFailed(f"a KV frame's {kind} header has missing or unknown keys: {odd}")
    for name, limit in limits.items():
        _check_field(kind, name, limit, fields[name])


def _check_field(kind: str, name: str, limit: Limit, value: object) -> None:
    if not limit.allows(value):
        raise TransferFailed(f"{name} in a KV frame's {kind} header must be {limit}, not {value!r:.40}")
