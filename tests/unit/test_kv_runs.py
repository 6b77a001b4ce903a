"""Payloads in pieces: copies and checksums against those of plain bytes."""

from __future__ import annotations

import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kv_rig import FINGERPRINT, random_pool

from kv_transfer.frames.cells import Cells
from kv_transfer.frames.runs import Runs

FIRST_CALLS = """
import time
from kv_transfer.frames.runs import Runs

runs, started = Runs.of(bytes(1 << 12)), time.thread_time()
runs.gathered()
runs.checksum()
print(time.thread_time() - started)
"""
PARTS = st.lists(st.binary(max_size=90), max_size=9)


def test_a_process_has_paid_for_first_calls_when_the_module_is_loaded() -> None:
    """20 ms, of the processor, in the midst of its first transfer."""

    def seconds() -> float:
        return float(subprocess.run([sys.executable, "-c", FIRST_CALLS], capture_output=True, check=True).stdout)

    assert min(seconds() for _ in range(3)) < 0.002


@given(PARTS)
def test_the_checksum_is_crc32_of_the_pieces_in_order(parts: list[bytes]) -> None:
    assert Runs.of(*parts).checksum() == zlib.crc32(b"".join(parts))


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("streamed", [True, False])
@given(st.binary(max_size=300), st.lists(st.integers(0, 300)), st.lists(st.integers(0, 300)))
def test_a_copy_may_be_divided_otherwise(
    checked: bool, streamed: bool, payload: bytes, cuts: list[int], others: list[int]
) -> None:
    """And reaches no byte beside its target."""
    source = [bytes(part) for part in np.split(np.frombuffer(payload, np.uint8), sorted(cuts))]
    room = np.full(len(payload) + 16, 7, np.uint8)
    target = np.split(room[8:-8], sorted(others))
    assert Runs.of(*source).copy_to(Runs.of(*target), checked, streamed) == (zlib.crc32(payload) if checked else 0)
    assert room.tobytes() == b"\x07" * 8 + payload + b"\x07" * 8


@given(st.binary(max_size=50), PARTS)
def test_a_frame_is_its_head_and_its_payload(head: bytes, parts: list[bytes]) -> None:
    payload, told = b"".join(parts), []

    def tell(crc: int) -> bytes:
        told.append(crc)
        return head

    crc = zlib.crc32(payload)
    assert Runs.of(*parts).after(len(head), tell) == (head + payload, crc)
    assert told == [crc]
    assert Runs.of(*parts).gathered() == (payload, crc)


@pytest.mark.parametrize("room", [1, 3])
def test_a_head_of_another_size_is_none(room: int) -> None:
    with pytest.raises(ValueError, match=f"2 bytes do not fill {room}"):
        Runs.of(b"payload").after(room, lambda crc: b"ab")


def test_a_copy_of_another_size_is_none() -> None:
    room = np.zeros(3, np.uint8)
    with pytest.raises(ValueError, match="2 bytes do not fill 3"):
        Runs.of(b"ab").copy_to(Runs.of(room))
    assert not room.any()


@pytest.mark.parametrize(
    ("blocks", "layers", "tokens"),
    [
        ((0, 12), range(3), range(16)),
        ((0, -1), range(3), range(16)),
        ((0, 1), range(2, 4), range(16)),
        ((0, 1), range(1, 1), range(16)),
        ((0, 1), range(-1, 2), range(16)),
    ],
)
def test_cells_outside_of_the_pool_have_no_address(blocks: tuple[int, ...], layers: range, tokens: range) -> None:
    pool = random_pool(FINGERPRINT, 1, blocks=12)
    with pytest.raises(IndexError):
        Cells(pool, blocks, layers, tokens).pieces()


@pytest.mark.parametrize("blocks", [(), (0,), (0, 1)])
def test_a_table_that_is_too_short_has_no_address(blocks: tuple[int, ...]) -> None:
    cells = Cells(torch.zeros(3, 2, 12, 8, 2, 8), blocks, range(3), range(17))
    with pytest.raises(IndexError, match="block table"):
        cells.pieces()
