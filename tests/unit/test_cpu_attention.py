"""Paged attention on CPU against the textbook, over random page layouts."""

from __future__ import annotations

import itertools
import random
import threading
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tandem.engine.backends.cpu.attention import CpuAttention, write_kv
from tandem.engine.backends.cpu.kernels import tile
from tandem.engine.backends.cpu.kernels.tile import registers_suffice
from tandem.engine.backends.torch_attention import reference_attention
from tandem.engine.batch import AttentionOptions, PagedBatch


@dataclass(frozen=True)
class Sequence:
    """One sequence's whole context; its last `rows` positions are the step's."""

    query_CxHxD: Tensor
    key_CxKxD: Tensor
    value_CxKxD: Tensor
    rows: int


@dataclass(frozen=True)
class Step:
    sequences: list[Sequence]
    batch: PagedBatch
    query: Tensor
    key: Tensor
    value: Tensor
    k_pool: Tensor
    v_pool: Tensor

    def run(self, options: AttentionOptions) -> Tensor:
        write_kv(self.key, self.value, self.k_pool, self.v_pool, self.batch)
        return CpuAttention(self.batch, options)(self.query, self.key, self.value, self.k_pool, self.v_pool)


def make_sequence(
    context: int, rows: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype = torch.float32
) -> Sequence:
    shapes = ((context, heads, dim), (context, kv_heads, dim), (context, kv_heads, dim))
    query, key, value = (torch.randn(shape).to(dtype) for shape in shapes)
    return Sequence(query, key, value, rows)


def make_step(sequences: list[Sequence], num_decodes: int, page: int) -> Step:
    """Lay the sequences out over random pages of a pool full of NaN, with all but the step's rows written."""
    blocks = [-(-len(s.key_CxKxD) // page) for s in sequences]
    num_blocks = sum(blocks) + 3
    free = random.sample(range(num_blocks), num_blocks)
    table = torch.zeros(len(sequences), max(blocks), dtype=torch.int32)
    shape = (num_blocks, page, *sequences[0].key_CxKxD.shape[1:])
    dtype = sequences[0].key_CxKxD.dtype
    k_pool, v_pool = torch.full(shape, float("nan"), dtype=dtype), torch.full(shape, float("nan"), dtype=dtype)
    slots: list[int] = []
    for i, s in enumerate(sequences):
        own = [free.pop() for _ in range(blocks[i])]
        table[i, : len(own)] = torch.tensor(own, dtype=torch.int32)
        places = [own[p // page] * page + p % page for p in range(len(s.key_CxKxD))]
        past = len(places) - s.rows
        for pool, whole in ((k_pool, s.key_CxKxD), (v_pool, s.value_CxKxD)):
            pool.view(-1, *shape[2:])[torch.tensor(places[:past], dtype=torch.int64)] = whole[:past]
        slots += places[past:]
    starts = list(itertools.accumulate((s.rows for s in sequences), initial=0))
    contexts = [len(s.key_CxKxD) for s in sequences]
    batch = PagedBatch(
        num_decodes=num_decodes,
        query_starts=starts,
        context_lens=contexts,
        block_table_BxM=table,
        context_lens_B=torch.tensor(contexts, dtype=torch.int32),
        slots_T=torch.tensor(slots),
        query_starts_B1=torch.tensor(starts, dtype=torch.int32),
    )
    query = torch.cat([s.query_CxHxD[-s.rows :] for s in sequences])
    key = torch.cat([s.key_CxKxD[-s.rows :] for s in sequences])
    value = torch.cat([s.value_CxKxD[-s.rows :] for s in sequences])
    return Step(sequences, batch, query, key, value, k_pool, v_pool)


def textbook(sequence: Sequence, options: AttentionOptions) -> Tensor:
    """One row and one head at a time, in double precision, sharing no code with the module under test."""
    out = torch.empty(sequence.rows, *sequence.query_CxHxD.shape[1:], dtype=torch.float64)
    context, heads = len(sequence.key_CxKxD), sequence.query_CxHxD.shape[1]
    group = heads // sequence.key_CxKxD.shape[1]
    for row, head in itertools.product(range(sequence.rows), range(heads)):
        position = context - sequence.rows + row
        first = max(0, position - options.window + 1) if options.window else 0
        while options.chunk and first // options.chunk != position // options.chunk:
            first += 1
        keys = sequence.key_CxKxD[first : position + 1, head // group].double()
        values = sequence.value_CxKxD[first : position + 1, head // group].double()
        scores = keys @ sequence.query_CxHxD[position, head].double() * options.scale
        if options.softcap:
            scores = options.softcap * torch.tanh(scores / options.softcap)
        out[row, head] = scores.softmax(0) @ values
    return out


OPTIONS = {
    "plain": AttentionOptions(scale=0.25),
    "window": AttentionOptions(scale=0.25, window=37),
    "softcap": AttentionOptions(scale=0.5, softcap=3.0),
    "window+softcap": AttentionOptions(scale=0.5, window=65, softcap=3.0),
    "chunk": AttentionOptions(scale=0.25, chunk=37),
    "chunk of a block": AttentionOptions(scale=0.25, chunk=64),
    "long chunk": AttentionOptions(scale=0.25, chunk=150),
    "chunk+window+softcap": AttentionOptions(scale=0.5, window=40, chunk=65, softcap=3.0),
}
# (context, rows): decodes first, then a whole prompt, a continued chunk, a one-row chunk, a window-crossing one.
MIXED = [(1, 1), (63, 1), (64, 1), (65, 1), (300, 1), (5, 5), (90, 90), (130, 40), (70, 1), (200, 7)]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    random.seed(0)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "page"), [(4, 4, 16, 16), (6, 2, 24, 5), (8, 1, 64, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixed_batch_equals_the_textbook(
    options: AttentionOptions, heads: int, kv_heads: int, dim: int, page: int, dtype: torch.dtype
) -> None:
    sequences = [make_sequence(c, rows, heads, kv_heads, dim, dtype) for c, rows in MIXED]
    step = make_step(sequences, 5, page)
    out = step.run(options)
    assert out.dtype == dtype
    assert out.is_contiguous()
    want = torch.cat([textbook(s, options) for s in sequences])
    tolerance = 2e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(out.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_reference_equals_the_textbook(options: AttentionOptions) -> None:
    s = make_sequence(80, 30, 6, 3, 8)
    got = reference_attention(s.query_CxHxD[-30:], s.key_CxKxD, s.value_CxKxD, 50, options)
    torch.testing.assert_close(got.double(), textbook(s, options), rtol=2e-6, atol=2e-6)


def test_long_chunks_are_tiled() -> None:
    for rows, options in (
        (700, OPTIONS["window"]),
        (700, OPTIONS["softcap"]),
        (600, OPTIONS["plain"]),
        (700, OPTIONS["long chunk"]),
    ):
        s = make_sequence(700, rows, 2, 1, 8)
        want = reference_attention(s.query_CxHxD[-rows:], s.key_CxKxD, s.value_CxKxD, 700 - rows, options)
        torch.testing.assert_close(make_step([s], 0, 16).run(options), want, rtol=2e-6, atol=2e-6)


def test_heads_first_views_are_accepted() -> None:
    s = make_sequence(50, 1, 4, 2, 16)
    step = make_step([s, make_sequence(40, 40, 4, 2, 16)], 1, 16)
    want = step.run(OPTIONS["plain"])
    views = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (step.query, step.key, step.value)]
    write_kv(views[1], views[2], step.k_pool, step.v_pool, step.batch)
    got = CpuAttention(step.batch, OPTIONS["plain"])(*views, step.k_pool, step.v_pool)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_a_decode_row_does_not_depend_on_its_batch_or_threads(options: AttentionOptions) -> None:
    sequences = [make_sequence(c, 1, 8, 2, 64) for c in (1, 17, 64, 129, 500, 777, 1000, 31)]
    together = make_step(sequences, len(sequences), 16).run(options)
    threads = torch.get_num_threads()
    for count, page in ((1, 16), (2, 4), (3, 64)):
        torch.set_num_threads(count)
        try:
            alone = [make_step([s], 1, page).run(options)[0] for s in sequences]
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.skipif(not registers_suffice(), reason="the tiles of the chunk kernel need AVX-512")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_a_row_of_a_chunk_does_not_depend_on_the_cut_or_threads(options: AttentionOptions) -> None:
    whole = make_sequence(333, 333, 4, 2, 80)
    want = make_step([whole], 0, 16).run(options)
    threads = torch.get_num_threads()
    for count, page, context, rows in ((1, 16, 333, 1), (2, 5, 333, 100), (3, 64, 200, 150), (2, 16, 65, 65)):
        cut = Sequence(*(t[:context] for t in (whole.query_CxHxD, whole.key_CxKxD, whole.value_CxKxD)), rows)
        torch.set_num_threads(count)
        try:
            got = make_step([make_sequence(70, 70, 4, 2, 80), cut], 0, page).run(options)[70:]
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(got, want[context - rows : context])


@pytest.mark.parametrize("rows", [1, 150])
def test_large_scores_and_nan(rows: int) -> None:
    s = make_sequence(200, rows, 2, 2, 16)
    hot = Sequence(s.query_CxHxD * 100, s.key_CxKxD, s.value_CxKxD, rows)
    options = OPTIONS["plain"]
    out = make_step([hot], rows == 1, 16).run(options)
    torch.testing.assert_close(out.double(), textbook(hot, options), rtol=1e-4, atol=1e-4)
    for poison in ("query", "key", "value"):
        poisoned = make_step([s], rows == 1, 16)
        getattr(poisoned, poison)[0, 0, 0] = float("nan")
        assert poisoned.run(options).isnan().any(), f"a NaN in the {poison} must surface, not vanish"


def test_without_tiles_chunks_go_through_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile, "registers_suffice", lambda: False)
    test_mixed_batch_equals_the_textbook(OPTIONS["window"], 6, 2, 24, 5, torch.float32)
    test_mixed_batch_equals_the_textbook(OPTIONS["plain"], 4, 4, 16, 16, torch.float32)
    test_mixed_batch_equals_the_textbook(OPTIONS["chunk"], 6, 2, 24, 5, torch.float32)
    test_mixed_batch_equals_the_textbook(OPTIONS["chunk+window+softcap"], 4, 4, 16, 16, torch.float32)


def test_two_engines_on_two_threads() -> None:
    sequences = [make_sequence(c, 1, 8, 2, 32) for c in (400, 90, 700)] + [make_sequence(60, 60, 8, 2, 32)]
    options = OPTIONS["plain"]
    want = make_step(sequences, 3, 16).run(options)
    steps = [make_step(sequences, 3, 16) for _ in range(2)]
    wrong: list[int] = []

    def engine(index: int) -> None:
        wrong.extend(index for _ in range(50) if not torch.equal(steps[index].run(options)[:3], want[:3]))

    threads = [threading.Thread(target=engine, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_write_kv_fills_the_slots_and_nothing_else(dtype: torch.dtype) -> None:
    step = make_step([make_sequence(300, 299, 2, 2, 8, dtype), make_sequence(7, 1, 2, 2, 8, dtype)], 0, 16)
    expected = []
    for new, pool in ((step.key, step.k_pool), (step.value, step.v_pool)):
        want = pool.clone()
        for row, slot in enumerate(step.batch.slots_T.tolist()):
            want[slot // 16, slot % 16] = new[row]
        expected.append(want)
    wide = torch.cat([step.key, step.value], dim=1)  # rows that are not next to each other, as of a merged projection
    write_kv(wide[:, :2], wide[:, 2:], step.k_pool, step.v_pool, step.batch)
    for pool, want in zip((step.k_pool, step.v_pool), expected, strict=True):
        torch.testing.assert_close(pool, want, rtol=0, atol=0, equal_nan=True)


def test_scale_is_the_callers() -> None:
    s = make_sequence(33, 33, 2, 2, 16)
    got = make_step([s], 0, 16).run(AttentionOptions(scale=0.7))
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (s.query_CxHxD, s.key_CxKxD, s.value_CxKxD))
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.7)[0].transpose(0, 1)
    torch.testing.assert_close(got, want)
