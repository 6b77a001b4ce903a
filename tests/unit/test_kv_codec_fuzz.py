"""Malformed frames by the thousand: each is refused in one sentence, and takes no memory to speak of."""

from __future__ import annotations

import tracemalloc
from collections import Counter

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kv_frames import OPEN, accept, data_frame, raw_frame

from kv_transfer.carriers.nixl.messages import Lent, Released, WriterName
from kv_transfer.carriers.ray.carrier import PlacedData, Taken
from kv_transfer.carriers.ray.plasma import Place
from kv_transfer.carriers.shm.messages import Granted, Locked, Mapped
from kv_transfer.frames.codec import MAX_HEADER_BYTES, encode
from kv_transfer.frames.messages import Abandon, Data, Done, Seal, Written
from kv_transfer.frames.runs import crc32
from tandem.errors import Refused, TransferFailed

MALFORMED = 10_000
# For any frame. A header of 4096 bytes can open a thousand maps before the innermost is refused.
MOST_ALLOCATED = 512 << 10
BLOCK_IDS = bytes(range(8))
GOOD = {
    "open": encode(OPEN),
    "data": data_frame(),
    "placed": encode(PlacedData.of(Data(3, 2, 2, 10, 4, 8, 5), Place(b"o" * 28, b"w" * 90))),
    "written": encode(Written(3, 2, 2, 10, 4, 8, 5)),
    "mapped": encode(Mapped(7, 8, "m" * 32, 1 << 30, 64, 2, crc32(BLOCK_IDS)), BLOCK_IDS),
    "locked": encode(Locked()),
    "granted": encode(Granted()),
    "writer": encode(WriterName("w" * 32)),
    "lent": encode(Lent("a" * 32, 1 << 46, "cpu", 0, 64, 5, 2, crc32(b"agent" + BLOCK_IDS)), b"agent" + BLOCK_IDS),
    "released": encode(Released("r" * 32)),
    "seal": encode(Seal(1, 2, 3, 4)),
    "abandon": encode(Abandon()),
    "taken": encode(Taken(7)),
    "done": encode(Done(1, 10240)),
}
HEADERS = [frame[12 : 12 + int.from_bytes(frame[6:8], "big")] for frame in GOOD.values()]
# What says that 4 GiB, or as many members, follow: of text, binary, arrays, maps, extensions; and 64 KiB.
HUGE = st.sampled_from([mark + b"\xff" * 4 for mark in (b"\xdb", b"\xc6", b"\xdd", b"\xdf", b"\xc9")])
LARGE = st.sampled_from([mark + b"\xff" * 2 for mark in (b"\xda", b"\xc5", b"\xdc", b"\xde", b"\xc8")])
# Maps and arrays within each other, as deep as a header has room.
DEEP = st.builds(
    lambda mark, depth, end: (mark * depth)[: MAX_HEADER_BYTES - 64] + end,
    st.sampled_from([b"\x81\xa1a", b"\x81\xa4kind", b"\x91"]),
    st.integers(1, MAX_HEADER_BYTES),
    st.binary(max_size=3),
)
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "replace", "add", "cut"]),
        st.integers(0, 2**16),
        st.binary(min_size=1, max_size=8) | HUGE | LARGE,
    ),
    min_size=1,
    max_size=4,
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=20) | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)
FIELDS = st.dictionaries(st.sampled_from(["frames", "bytes", "sequence"]) | st.text(max_size=8), VALUES, max_size=3)


def changed(whole: bytes, edits: list[tuple[str, int, bytes]]) -> bytes:
    for kind, place, new in edits:
        at = place % (len(whole) + 1)
        before, rest = whole[:at], whole[at:]
        if kind == "flip":
            whole = before + bytes(byte ^ 1 << place % 8 for byte in rest[:1]) + rest[1:]
        elif kind == "cut":
            whole = before
        else:
            whole = before + new + (rest[len(new) :] if kind == "replace" else rest)
    return whole


def with_member(header: bytes, value: bytes) -> bytes:
    """One more than it had; what ends it is whatever the value is not."""
    return bytes([header[0] + 1]) + b"\xa1x" + value + header[1:]


def guarded(header: bytes, payload: bytes) -> bytes:
    """Behind an intact prelude anything can stand."""
    return raw_frame(header[:MAX_HEADER_BYTES], payload)


NOISE = st.builds(
    bytes.__add__, st.sampled_from([b"", b"TKVF", b"TKVF\0\2", b"TKVF\0\2\x10\0"]), st.binary(max_size=300)
)
SPOILED = st.builds(changed, st.sampled_from(list(GOOD.values())), EDITS)
SPOILED_HEADER = st.one_of(
    st.builds(changed, st.sampled_from(HEADERS), EDITS),
    st.builds(with_member, st.sampled_from(HEADERS), DEEP | HUGE | LARGE),
    st.builds(bytes.__add__, HUGE | LARGE, st.binary(max_size=200)),
    DEEP,
    st.builds(lambda kind, fields: msgpack.packb({"kind": kind, **fields}), st.sampled_from(list(GOOD)), FIELDS),
)
FRAMES = st.one_of(NOISE, SPOILED, st.builds(guarded, SPOILED_HEADER, st.binary(max_size=20)))


def fate_of(frame: bytes) -> str:
    """What a receiver says of it. Fails the test for any other exception, and for memory."""
    refusal: TransferFailed | Refused | None = None
    tracemalloc.start()
    try:
        accept(frame)
    except (TransferFailed, Refused) as error:
        refusal = error
    finally:
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert most < MOST_ALLOCATED
    if refusal is None:
        return "taken"
    assert refusal.message.isprintable()
    assert len(refusal.message) < 300
    return type(refusal).__name__


def test_ten_thousand_malformed_frames() -> None:
    """A change may give another good frame; those do not count."""
    fates: Counter[str] = Counter()

    @settings(max_examples=MALFORMED + MALFORMED // 10, database=None, suppress_health_check=list(HealthCheck))
    @given(FRAMES)
    def try_one(frame: bytes) -> None:
        fates[fate_of(frame)] += 1

    try_one()
    assert fates.total() - fates["taken"] >= MALFORMED, fates
    assert min(fates["CorruptFrame"], fates["TransferFailed"]) > MALFORMED / 5, f"too much of one sort: {fates}"


@pytest.mark.parametrize("mark", [b"\x81\xa1a", b"\x91", b"\x81\x91"], ids=["maps", "arrays", "keys"])
def test_nothing_is_too_deep(mark: bytes) -> None:
    """Python's own limit of recursion is a thousand."""
    for depth in range(1, MAX_HEADER_BYTES // len(mark)):
        assert fate_of(raw_frame(mark * depth + b"\xc0")) == "TransferFailed"


def test_a_frame_at_the_cap_is_not_copied() -> None:
    payload = bytes(16 << 20)
    whole = encode(Data(0, 0, 1, 0, 1, len(payload), 1), payload)
    assert fate_of(whole) == "CorruptFrame"
