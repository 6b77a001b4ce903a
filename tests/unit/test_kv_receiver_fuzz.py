"""Intact frames that make no transfer together: the receiver says so, and writes nowhere but in its reservation."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_reservations import FakeReservation, FakeReservations
from kv_rig import FINGERPRINT, POOL_BLOCKS, random_pool

from kv_transfer.base import Counters, TransferTarget
from kv_transfer.carriers.nixl.messages import WriterName
from kv_transfer.carriers.ray.carrier import Taken
from kv_transfer.carriers.shm.messages import Granted, Locked
from kv_transfer.ends.admission import TransferAdmission
from kv_transfer.ends.receiver import Intake, Receiver
from kv_transfer.ends.sender import opening_of
from kv_transfer.frames.cells import Cells
from kv_transfer.frames.codec import chain_checksum, encode
from kv_transfer.frames.layout import KVLayout
from kv_transfer.frames.messages import Abandon, Data, KVMessage, Seal
from kv_transfer.frames.wire_dtype import WIRE_DTYPES, wire_dtype
from tandem.errors import Refused, TandemError, TransferFailed

PROMPT, BLOCKS = 11, (5, 2)
TARGET = TransferTarget("secret", "r1", 0, "", 0, PROMPT, FINGERPRINT)
TRIES = 300
# One edit: which frame, what becomes of it, and numbers to use.
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["drop", "repeat", "move", "field", "field", "stranger", "kind"]),
        st.integers(0, 20),
        st.integers(0, 20),
        st.integers(0, 40) | st.sampled_from([2**31 - 1, 2**32 - 1, 1 << 24]),
    ),
    min_size=1,
    max_size=3,
)
Frame = tuple[KVMessage, bytes]


@pytest.fixture(scope="module")
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as threads:
        yield threads


def good_frames(wire: str) -> list[Frame]:
    pool, checksum, size = random_pool(FINGERPRINT, seed=2), 0, 0
    dtype = wire_dtype(wire, KVLayout.of(FINGERPRINT))
    frames: list[Frame] = [(opening_of(TARGET, wire), b"")]
    for sequence, (layer, tokens) in enumerate(product(range(3), (range(7), range(7, PROMPT)))):
        layers = range(layer, layer + 1)
        payload, crc = dtype.pieces(Cells(pool, BLOCKS, layers, tokens)).gathered()
        data = Data.of_ranges(sequence, layers, tokens, len(payload), crc)
        checksum, size = chain_checksum(checksum, data), size + data.payload_bytes
        frames.append((data, payload))
    return [*frames, (Seal(9, 6, size, checksum), b"")]


GOOD = {wire: good_frames(wire) for wire in WIRE_DTYPES}
POOL = random_pool(FINGERPRINT, seed=1)


def edited(frames: list[Frame], edits: list[tuple[str, int, int, int]]) -> list[Frame]:
    frames = list(frames)
    for kind, which, other, number in edits:
        at = which % len(frames)
        if kind == "drop":
            del frames[at]
        elif kind == "repeat":
            frames.insert(other % (len(frames) + 1), frames[at])
        elif kind == "move":
            frames.insert(other % len(frames), frames.pop(at))
        elif kind == "field":
            frames[at] = (with_field(frames[at][0], other, number), frames[at][1])
        elif kind == "kind":
            others: list[KVMessage] = [Abandon(), Locked(), Granted(), Taken(number % 9), WriterName("w")]
            frames[at] = (others[other % len(others)], b"")
        else:
            frames[at] = (opening_of(replace(TARGET, request_id="r2")), b"")
    return frames


def with_field(message: KVMessage, which: int, number: int) -> KVMessage:
    """One of its numbers replaced, by what the schema allows or not."""
    names = [field.name for field in fields(message) if isinstance(getattr(message, field.name), int)]
    changes: dict[str, Any] = {names[which % len(names)]: number} if names else {}
    return replace(message, **changes)


async def stream(frames: list[Frame]) -> AsyncIterator[bytes]:
    for message, payload in frames:
        await asyncio.sleep(0)
        try:
            yield encode(message, payload)
        except TransferFailed:  # a sender of ours cannot even make it
            yield b"TKVF" + payload


async def receive(frames: list[Frame], threads: ThreadPoolExecutor) -> str:
    """What became of the reservation. Fails the test for an error of any other sort, and for a write elsewhere."""
    pool = POOL.clone()
    others = [block for block in range(POOL_BLOCKS) if block not in BLOCKS]
    before, reservation = pool[:, :, others].clone(), FakeReservation(pool, BLOCKS, TARGET)
    admission = TransferAdmission(FakeReservations(FINGERPRINT, {"secret": reservation}))
    try:
        await Receiver(admission, threads, 2, Counters(), Intake()).receive(stream(frames), lost)
    except (TransferFailed, Refused):
        assert reservation.first_token is None
        assert not reservation.given_up
    else:
        assert not reservation.errors
        assert reservation.ended
    assert reservation.writers == 0
    assert torch.equal(pool[:, :, others], before)
    return "failed" if reservation.errors else "ended" if reservation.ended else "untouched"


def lost() -> TandemError:
    return TransferFailed("the sender left before the seal")


@pytest.mark.parametrize("wire", WIRE_DTYPES)
async def test_good_frames_are_good(threads: ThreadPoolExecutor, wire: str) -> None:
    assert await receive(GOOD[wire], threads) == "ended"


@pytest.mark.parametrize("wire", WIRE_DTYPES)
def test_intact_frames_in_a_wrong_order_or_with_wrong_numbers(threads: ThreadPoolExecutor, wire: str) -> None:
    ends: Counter[str] = Counter()

    @settings(max_examples=TRIES, database=None)
    @given(EDITS)
    def try_one(edits: list[tuple[str, int, int, int]]) -> None:
        ends[asyncio.run(receive(edited(GOOD[wire], edits), threads))] += 1

    try_one()
    assert ends["failed"] > TRIES / 2, ends
    assert ends["untouched"] > TRIES / 100, ends
