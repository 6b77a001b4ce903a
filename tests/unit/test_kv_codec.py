"""Frames: what is encoded comes back, and nothing else is taken."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any
from zlib import crc32

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kv_frames import COUNTS, MESSAGES, OPEN, accept, data_frame, raw_frame

from kv_transfer.frames.codec import (
    MAX_FRAME_BYTES,
    MAX_HEADER_BYTES,
    VERSION,
    chain_checksum,
    decode,
    encode,
    frame_of,
)
from kv_transfer.frames.messages import Data, Done, KVMessage, Seal
from kv_transfer.frames.runs import Runs
from tandem import rpc
from tandem.config import parse_config
from tandem.errors import ConfigError, Refused, TransferFailed


@given(MESSAGES)
def test_messages_come_back(message: KVMessage) -> None:
    assert accept(encode(message)) == message


@given(COUNTS, st.integers(0, 1000), st.integers(1, 99), st.lists(st.binary(min_size=1, max_size=300), min_size=1))
def test_data_comes_back(sequence: int, start: int, count: int, parts: list[bytes]) -> None:
    cells = range(start, start + count)
    data, frame = frame_of(sequence, cells, cells, Runs.of(*parts))
    message, payload = decode(frame)
    assert message == data == Data.of_ranges(sequence, cells, cells, len(payload), crc32(payload))
    assert (data.layers, data.tokens, data.sequence) == (cells, cells, sequence)
    assert bytes(payload) == b"".join(parts)


@pytest.mark.parametrize("frame", [data_frame(), encode(OPEN), encode(Seal(1, 2, 3, 4))], ids=["data", "open", "seal"])
def test_every_flipped_bit_is_detected(frame: bytes) -> None:
    for bit in range(len(frame) * 8):
        spoiled = bytearray(frame)
        spoiled[bit // 8] ^= 1 << bit % 8
        with pytest.raises(TransferFailed):
            accept(bytes(spoiled))


@pytest.mark.parametrize("frame", [data_frame(), encode(OPEN)], ids=["data", "open"])
def test_every_cut_and_every_tail_is_detected(frame: bytes) -> None:
    for length in range(len(frame)):
        with pytest.raises(TransferFailed):
            accept(frame[:length])
    for tail in (b"\x00", frame):
        with pytest.raises(TransferFailed):
            accept(frame + tail)


@given(st.binary(max_size=4000), st.booleans())
def test_garbage_is_refused_in_one_sentence(noise: bytes, with_magic: bool) -> None:
    with pytest.raises(TransferFailed) as caught:
        accept((b"TKVF" if with_magic else b"") + noise)
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 300


@given(st.recursive(st.none() | st.integers(-(2**63), 2**64 - 1) | st.text() | st.binary() | st.floats(), st.lists))
def test_a_header_of_any_other_value_is_refused(value: Any) -> None:
    with pytest.raises(TransferFailed):
        accept(raw_frame(msgpack.packb(value)[:MAX_HEADER_BYTES]))


def test_a_frame_over_the_cap_is_refused() -> None:
    with pytest.raises(TransferFailed, match="not in"):
        decode(bytes(MAX_FRAME_BYTES + 1))
    with pytest.raises(TransferFailed, match="too long"):
        decode(raw_frame(bytes(MAX_HEADER_BYTES + 1)))


def test_a_pickle_is_never_loaded() -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return pytest.fail, ("unpickled",)

    with pytest.raises(TransferFailed):
        accept(raw_frame(pickle.dumps(Bomb())))
    with pytest.raises(TransferFailed):
        accept(raw_frame(msgpack.packb(msgpack.ExtType(5, pickle.dumps(Bomb())))))


def test_another_version_is_refused_by_number() -> None:
    header = msgpack.packb({"kind": "done", "frames": 1, "bytes": 1})
    assert accept(raw_frame(header)) == Done(1, 1)
    with pytest.raises(Refused, match=f"version {VERSION + 1}"):
        accept(raw_frame(header, version=VERSION + 1))


GOOD = {"kind": "seal", "first_token": 1, "frames": 2, "bytes": 3, "checksum": b"\0\0\0\4"}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"first_token": -1}, "first_token .* whole number"),
        ({"first_token": 2**31}, "first_token"),
        ({"first_token": True}, "first_token"),
        ({"first_token": 1.0}, "first_token"),
        ({"first_token": "1"}, "first_token"),
        ({"bytes": 2**60}, "bytes"),
        ({"checksum": 4}, "checksum .* must be 4 bytes"),
        ({"checksum": b"\0\0\4"}, "checksum .* must be 4 bytes"),
        ({"more": 1}, "missing or unknown keys: 'more'"),
        ({"kind": "data"}, "missing or unknown keys"),
        ({"kind": "steal"}, "kind 'steal' is unknown"),
        ({"kind": 7}, "kind '7' is unknown"),
        ({"kind": b"seal"}, "is unknown"),
    ],
)
def test_headers_keep_to_the_schema(change: dict[str, Any], why: str) -> None:
    assert accept(raw_frame(msgpack.packb(GOOD))) == Seal(1, 2, 3, 4)
    with pytest.raises(TransferFailed, match=why):
        accept(raw_frame(msgpack.packb({**GOOD, **change})))


@pytest.mark.parametrize("name", GOOD)
def test_every_key_is_needed(name: str) -> None:
    with pytest.raises(TransferFailed):
        accept(raw_frame(msgpack.packb({key: value for key, value in GOOD.items() if key != name})))


def test_keys_that_are_not_text_are_refused() -> None:
    with pytest.raises(TransferFailed, match="not readable"):
        accept(raw_frame(msgpack.packb({1: 2})))


def test_a_sender_cannot_make_what_a_receiver_would_refuse() -> None:
    with pytest.raises(TransferFailed, match="request_id"):
        encode(replace(OPEN, request_id="r" * 129))
    for checksum in (-1, 2**32, 0.5, None):
        with pytest.raises(TransferFailed, match=r"checksum in .* seal header must be a whole number in \[0, "):
            encode(Seal(1, 2, 3, checksum))  # type: ignore[arg-type]
    widest = "\U0001f600" * 128
    message = replace(OPEN, request_id=widest, reservation_id=widest)
    assert accept(encode(message)) == message


def test_the_chain_depends_on_order() -> None:
    one, other = (Data.of_ranges(0, range(1), range(1), 1, checksum) for checksum in (4, 5))
    assert chain_checksum(chain_checksum(0, one), other) != chain_checksum(chain_checksum(0, other), one)


def test_what_a_router_may_send_fits_into_what_a_worker_takes() -> None:
    """The limits are set in rooms that cannot import each other."""
    with pytest.raises(ConfigError, match=r"router\.max_message_bytes: .* less than or equal to 16777216"):
        parse_config({"router": {"max_message_bytes": (1 << 24) + 1}})
    assert (1 << 24) + 4096 == rpc.MAX_WORKER_MESSAGE_BYTES <= MAX_FRAME_BYTES
