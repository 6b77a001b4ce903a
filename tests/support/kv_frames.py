"""Frames of KV transfers for tests of the codec: messages of every kind, and frames that are not as they should be."""

from __future__ import annotations

import struct
import zlib

from hypothesis import strategies as st

from kv_transfer.carriers.nixl.messages import Released, WriterName
from kv_transfer.carriers.ray.carrier import PlacedData, Taken
from kv_transfer.carriers.shm.messages import Granted, Locked
from kv_transfer.frames.codec import VERSION, CorruptFrame, decode, frame_of
from kv_transfer.frames.messages import Abandon, Data, Done, KVMessage, Open, Seal, Written
from kv_transfer.frames.runs import Runs
from tandem.types import Fingerprint

FINGERPRINT = Fingerprint("c" * 64, "w" * 64, "bfloat16", 16, 32, 8, 128, 1)
OPEN = Open("secret", "request", 1, FINGERPRINT, 0, 100, "native")
COUNTS = st.integers(0, 2**31 - 1)
POSITIVES = st.integers(1, 2**31 - 1)
IDS = st.text(min_size=1, max_size=128)
FINGERPRINTS = st.builds(Fingerprint, IDS, IDS, IDS, POSITIVES, POSITIVES, POSITIVES, POSITIVES, COUNTS)
PLACES = st.binary(min_size=1, max_size=512)
# Fields of a data frame's header.
CELLS = (COUNTS, COUNTS, POSITIVES, COUNTS, POSITIVES, st.integers(1, 2**24), st.integers(0, 2**32 - 1))
# All that may stand without a payload.
MESSAGES: st.SearchStrategy[KVMessage] = st.one_of(
    st.builds(Open, IDS, IDS, COUNTS, FINGERPRINTS, COUNTS, POSITIVES, IDS),
    st.builds(Seal, COUNTS, COUNTS, st.integers(0, 2**53), st.integers(0, 2**32 - 1)),
    st.builds(PlacedData, *CELLS, PLACES, PLACES),
    st.builds(Written, *CELLS),
    st.builds(Locked),
    st.builds(Granted),
    st.builds(WriterName, IDS),
    st.builds(Released, IDS),
    st.builds(Taken, COUNTS),
    st.builds(Abandon),
    st.builds(Done, COUNTS, st.integers(0, 2**53)),
)


def data_frame(payload: bytes = b"kvkvkvkv") -> bytes:
    return frame_of(3, range(2, 4), range(10, 14), Runs.of(payload))[1]


def accept(frame: bytes) -> KVMessage:
    """What a receiver does with a frame."""
    message, payload = decode(frame)
    if type(message) is Data and zlib.crc32(payload) != message.checksum:
        raise CorruptFrame("the payload fails its checksum")
    return message


def raw_frame(header: bytes, payload: bytes = b"", version: int = VERSION, magic: bytes = b"TKVF") -> bytes:
    """A frame with an intact prelude around any header."""
    fixed = struct.pack(">4sHH", magic, version, len(header))
    return fixed + struct.pack(">I", zlib.crc32(fixed + header)) + header + payload
