"""Sizes, cuts, coverage, and the two ways (views on cpu, slots on devices) between a pool and bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kv_rig import FINGERPRINT, random_pool, rows_of

from kv_transfer.frames.cells import Cells
from kv_transfer.frames.layout import Coverage, KVLayout, cut
from tandem.errors import Refused, TransferFailed

LAYOUT = KVLayout.of(FINGERPRINT)
BLOCKS = (5, 6, 2, 11)


def test_sizes() -> None:
    layout = KVLayout(num_layers=32, num_kv_heads=8, head_dim=128, block_size=16, dtype="bfloat16")
    assert layout.token_bytes == 32 * 2 * 8 * 128 * 2
    assert layout.payload_bytes(2, 10) == 2 * 2 * 10 * 8 * 128 * 2
    assert layout.torch_dtype is torch.bfloat16


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(Refused, match="int4"):
        KVLayout.of(replace(FINGERPRINT, dtype="int4"))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@given(st.data())
def test_gather_and_scatter_are_exact(dtype: str, data: st.DataObject) -> None:
    fingerprint = replace(FINGERPRINT, dtype=dtype)
    pool, other = random_pool(fingerprint, 1, blocks=12), random_pool(fingerprint, 2, blocks=12)
    layers = range(data.draw(st.integers(0, 2)), 3)
    start = data.draw(st.integers(0, 31))
    tokens = range(start, data.draw(st.integers(start + 1, 32)))
    cells = Cells(pool, BLOCKS, layers, tokens)
    payload, checksum = cells.pieces().gathered()
    wanted = rows_of(pool, BLOCKS, tokens)[layers.start :]
    assert payload == wanted.contiguous().view(torch.uint8).numpy().tobytes()
    assert torch.equal(cells.gather_slots().view(wanted.shape), wanted)
    by_slots, untouched = other.clone(), other.clone()
    there = replace(cells, pool=other)
    assert there.scatter(memoryview(payload)) == checksum
    replace(cells, pool=by_slots).scatter_slots(payload)
    assert torch.equal(other, by_slots)
    assert torch.equal(rows_of(other, BLOCKS, tokens)[layers.start :], wanted)
    there.copy_from(replace(cells, pool=untouched).pieces())
    assert torch.equal(other, untouched), "nothing else was written"


@given(st.integers(0, 50), st.integers(1, 300), st.integers(0, 200))
def test_cuts_cover_everything_once_and_keep_to_the_size(start: int, count: int, cells: int) -> None:
    tokens = range(start, start + count)
    coverage = Coverage(LAYOUT.num_layers, tokens)
    for layers, part in cut(range(LAYOUT.num_layers), tokens, cells):
        coverage.add(layers, part)
        assert len(layers) * len(part) <= max(cells, 1)
    coverage.check_complete()


def test_frames_are_cut_by_layers_first() -> None:
    of_two_layers = 2 * 10
    assert [*cut(range(3), range(5, 15), of_two_layers)] == [(range(2), range(5, 15)), (range(2, 3), range(5, 15))]
    assert [*cut(range(1, 3), range(5, 15), of_two_layers)] == [(range(1, 3), range(5, 15))]


@pytest.mark.parametrize(
    ("layers", "tokens", "why"),
    [
        (range(1), range(6, 8), "twice"),
        (range(1), range(8, 10), "twice|gap"),
        (range(2), range(4, 8), "twice"),
        (range(1, 2), range(5, 8), "gap"),
        (range(2, 4), range(4, 8), "outside the 3 layers"),
        (range(1, 1), range(4, 8), "outside"),
        (range(1, 2), range(3, 8), "outside"),
        (range(1, 2), range(4, 21), "outside"),
    ],
)
def test_coverage_refuses(layers: range, tokens: range, why: str) -> None:
    coverage = Coverage(3, range(4, 20))
    coverage.add(range(1), range(4, 9))
    with pytest.raises(TransferFailed, match=why):
        coverage.add(layers, tokens)
    coverage.add(range(1, 3), range(4, 20))
    with pytest.raises(TransferFailed, match=r"layer 0, positions \[9, 20\) is missing"):
        coverage.check_complete()
    coverage.add(range(1), range(9, 20))
    coverage.check_complete()


def test_a_pool_of_another_shape_is_refused() -> None:
    pool = random_pool(FINGERPRINT, 1)
    LAYOUT.check_pool(pool, BLOCKS, 32)
    for wrong, blocks, tokens in (
        (pool.half(), BLOCKS, 32),
        (pool[:2], BLOCKS, 32),
        (pool[0], BLOCKS, 32),
        (pool.transpose(3, 2), BLOCKS, 32),
        (pool[:, :, ::2], BLOCKS, 32),
        (pool, BLOCKS, 33),
        (pool, (*BLOCKS[:3], 64), 32),
        (pool, (*BLOCKS[:3], -1), 32),
    ):
        with pytest.raises(Refused):
            LAYOUT.check_pool(wrong, blocks, tokens)
