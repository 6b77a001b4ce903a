"""Wire dtype int8: how far off it may be, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kv_rig import int8_pool, random_pool, rows_of, shaped
from torch import Tensor

from kv_transfer.frames.cells import Cells
from kv_transfer.frames.int8 import Int8
from kv_transfer.frames.layout import KVLayout
from kv_transfer.frames.runs import crc32
from kv_transfer.frames.wire_dtype import WIRE_DTYPES, wire_dtype
from tandem.config import WorkerConfig
from tandem.errors import Refused, TransferFailed
from tandem.types import Fingerprint

BLOCKS = (5, 6, 2, 11)
DTYPES = ["float32", "float16", "bfloat16"]
HEADS = [(1, 64), (2, 16), (8, 16)]
LAYERS = range(1, 3)


def layout_of(dtype: str, heads: int = 2, head_dim: int = 16) -> KVLayout:
    return KVLayout.of(shaped(dtype, heads, head_dim))


LAYOUTS = st.builds(lambda dtype, heads: layout_of(dtype, *heads), st.sampled_from(DTYPES), st.sampled_from(HEADS))


def fingerprint_of(layout: KVLayout) -> Fingerprint:
    return shaped(layout.dtype, layout.num_kv_heads, layout.head_dim)


def pool_of(layout: KVLayout, seed: int = 1) -> Tensor:
    return random_pool(fingerprint_of(layout), seed, blocks=12)


def cells_of(pool: Tensor, tokens: range) -> Cells:
    return Cells(pool, BLOCKS, LAYERS, tokens)


def payload_of(wire: Int8, pool: Tensor, tokens: range) -> bytes:
    return wire.pieces(cells_of(pool, tokens)).gathered()[0]


def write(wire: Int8, pool: Tensor, tokens: range, payload: bytes) -> None:
    assert wire.scatter(cells_of(pool, tokens), payload, crc32(payload))


def travelled(wire: Int8, pool: Tensor, tokens: range) -> Tensor:
    """[layers, 2, T, K, D] as they arrive, in a pool that held something else."""
    other = torch.full_like(pool, 7.0)
    write(wire, other, tokens, payload_of(wire, pool, tokens))
    return rows_of(other, BLOCKS, tokens)[LAYERS.start :]


def scales_of(rows: Tensor, tokens: range, size: int) -> Tensor:
    """[layers, 2, T, K, 1]: of each token's share of a block."""
    scales = torch.empty(*rows.shape[:4], 1)
    for block in {token // size for token in tokens}:
        share = [at for at, token in enumerate(tokens) if token // size == block]
        scales[:, :, share] = rows[:, :, share].float().abs().amax(dim=(2, 4), keepdim=True) / 127
    return scales


@st.composite
def cells(draw: st.DrawFn) -> range:
    start = draw(st.integers(0, 31))
    return range(start, draw(st.integers(start + 1, 32)))


@given(LAYOUTS, cells(), st.integers(-20, 10), st.integers(0, 3))
def test_no_element_is_off_by_more_than_half_a_scale(
    layout: KVLayout, tokens: range, magnitude: int, quiet: int
) -> None:
    pool = pool_of(layout) * 2.0**magnitude
    pool[:, :, BLOCKS[quiet]] *= 2.0**-3
    sent = rows_of(pool, BLOCKS, tokens)[LAYERS.start :]
    came = travelled(Int8(layout), pool, tokens).float()
    half = scales_of(sent, tokens, layout.block_size) / 2
    # float32's rounding of a quotient and of a product, and the pool dtype's of the result.
    finfo = torch.finfo(layout.torch_dtype)
    rounding = half * 1e-4 + came.abs() * finfo.eps / 2 + finfo.smallest_normal * finfo.eps
    assert ((came - sent.float()).abs() <= half + rounding).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_least_and_the_largest_numbers_keep_to_it(dtype: str) -> None:
    """Where a scale would be subnormal, and where 127 scales would be infinity."""
    layout = layout_of(dtype)
    finfo = torch.finfo(layout.torch_dtype)
    for size in (finfo.tiny / 100, finfo.tiny, finfo.max / 3, finfo.max):
        pool = torch.full_like(pool_of(layout), size)
        pool[..., ::2] *= -0.3
        came, sent = travelled(Int8(layout), pool, range(3, 20)).double(), pool[0, 0, 0, 0].double()
        scale = max(size / 127, np.finfo(np.float32).tiny)
        off = (came - sent).abs().max().item()
        assert off <= scale / 2 + size * finfo.eps / 2 + finfo.smallest_normal * finfo.eps, size


@given(LAYOUTS, cells(), st.integers(0, 99))
def test_zeros_stay_zeros(layout: KVLayout, tokens: range, seed: int) -> None:
    pool = pool_of(layout)
    zeros = torch.rand(pool.shape, generator=torch.Generator().manual_seed(seed)) < 0.3
    pool[zeros] = 0
    pool[:, :, BLOCKS[1]] = 0  # a whole block, so its scale is of nothing
    sent, came = rows_of(pool, BLOCKS, tokens)[LAYERS.start :], travelled(Int8(layout), pool, tokens)
    assert (came[sent == 0] == 0).all()


@given(LAYOUTS, cells())
def test_what_int8_holds_arrives_exactly_and_nowhere_else(layout: KVLayout, tokens: range) -> None:
    wire, pool, target = Int8(layout), int8_pool(fingerprint_of(layout), 1, blocks=12), pool_of(layout, 2)
    wanted = target.clone()
    for token in tokens:
        place = (BLOCKS[token // layout.block_size], token % layout.block_size)
        wanted[LAYERS.start :, :, *place] = pool[LAYERS.start :, :, *place]
    write(wire, target, tokens, payload_of(wire, pool, tokens))
    assert torch.equal(target, wanted)


@given(LAYOUTS, cells())
def test_devices_compute_what_the_host_computes(layout: KVLayout, tokens: range) -> None:
    wire, pool, ours, theirs = Int8(layout), pool_of(layout, 1), pool_of(layout, 2), pool_of(layout, 2)
    scales, values = wire.quantize_on_host(cells_of(pool, tokens))
    for mine, other in zip((scales, values), wire.quantize_on_device(cells_of(pool, tokens)), strict=True):
        assert np.array_equal(mine, other)
    wire.write_on_host(cells_of(ours, tokens), scales, values)
    wire.write_on_device(cells_of(theirs, tokens), scales, values)
    assert torch.equal(ours, theirs)


@given(LAYOUTS, cells())
def test_payloads_have_the_size_that_both_ends_compute(layout: KVLayout, tokens: range) -> None:
    wire = Int8(layout)
    shares = len({token // layout.block_size for token in tokens})
    size = 2 * len(LAYERS) * layout.num_kv_heads * (4 * shares + len(tokens) * layout.head_dim)
    assert len(payload_of(wire, pool_of(layout), tokens)) == wire.payload_bytes(len(LAYERS), tokens) == size
    assert size <= len(LAYERS) * len(tokens) * wire.cell_bytes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("odd", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_refused_and_only_where_it_travels(dtype: str, odd: float) -> None:
    layout = layout_of(dtype)
    wire, pool = Int8(layout), pool_of(layout)
    pool[2, 1, BLOCKS[1], 3, 1, 5] = odd  # position 11
    with pytest.raises(Refused, match="infinity or NaN"):
        payload_of(wire, pool, range(4, 12))
    with pytest.raises(Refused, match="infinity or NaN"):
        wire.quantize_on_device(cells_of(pool, range(11, 12)))
    for tokens in (range(4, 11), range(12, 20)):
        assert travelled(wire, pool, tokens).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "spoil",
    [
        lambda scales, values: scales.fill(math.nan),
        lambda scales, values: scales.__setitem__((1, 0, 1, 1), math.inf),
        lambda scales, values: scales.__setitem__((1, 0, 1, 1), 3e38),
        lambda scales, values: scales.__setitem__((1, 1, 0, 0), -1.0),
        lambda scales, values: scales.__setitem__((1, 1, 0, 0), 0.0),
        lambda scales, values: values.__setitem__((1, 1, 4, 3), -128),
    ],
    ids=["nan", "infinity", "too large", "negative", "zero", "-128"],
)
def test_numbers_that_no_sender_makes_are_refused(dtype: str, spoil: Callable[[Any, Any], None]) -> None:
    layout = layout_of(dtype)
    wire, pool, target = Int8(layout), pool_of(layout), pool_of(layout, 2)
    tokens, before = range(5, 12), target.clone()
    scales, values = wire.quantize_on_host(cells_of(pool, tokens))
    spoil(scales, values)
    with pytest.raises(TransferFailed, match="out of range"):
        write(wire, target, tokens, scales.tobytes() + values.tobytes())
    assert torch.equal(target, before)


def test_a_payload_of_another_checksum_is_not_written() -> None:
    layout = layout_of("float32")
    wire, pool, target = Int8(layout), pool_of(layout), pool_of(layout, 2)
    tokens, before = range(5, 12), target.clone()
    payload = payload_of(wire, pool, tokens)
    assert not wire.scatter(cells_of(target, tokens), payload, crc32(payload) ^ 1)
    assert torch.equal(target, before)


def test_the_configuration_knows_the_same_names() -> None:
    assert get_args(WorkerConfig.model_fields["wire_dtype"].annotation) == tuple(WIRE_DTYPES)
    for name in WIRE_DTYPES:
        assert wire_dtype(name, layout_of("float32")).name == name


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(Refused, match="'int3' is unknown to this worker; it takes native, int8"):
        wire_dtype("int3", layout_of("float32"))
