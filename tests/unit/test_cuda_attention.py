"""What attention on CUDA asks of flash attention, by numbers: its contract is played by the textbook, on cpu."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from fake_cuda import check_arguments
from torch import Tensor

from tandem.engine.backends.cuda import attention as cuda_attention
from tandem.engine.backends.cuda.attention import CudaAttention, FlashFeatures, why_not_flash, why_not_pages
from tandem.engine.backends.torch_attention import reference_attention
from tandem.engine.batch import AttentionOptions, PagedBatch

HEADS, KV_HEADS = 6, 2
LATEST = FlashFeatures(window=True, pages=True, gqa=True, splits=True)
OLDEST = FlashFeatures(window=True, pages=False, gqa=False, splits=False)
CONTEXTS = [300, 7, 512, 64]


def by_the_textbook(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """A row of a sequence stands at its end: row i of Q, over C keys, at position C - Q + i."""
    out = []
    for at, (start, end) in enumerate(pairwise(cu_seq_q.tolist())):
        first, last = cu_seq_k[at : at + 2].tolist()
        keys, values = key[first:last], value[first:last]
        if block_table is not None and seqused_k is not None:
            keys, values = (pool[block_table[at]].flatten(0, 1)[: seqused_k[at]] for pool in (key, value))
        assert end - start <= max_q
        assert len(keys) <= max_k
        position = torch.arange(len(keys) - (end - start), len(keys))[:, None] - torch.arange(len(keys))
        left, right = (size if size >= 0 else len(keys) for size in window_size)
        seen = (position <= left) & (position >= -right)
        group = query.shape[1] // keys.shape[1]
        keys, values = (x.float().repeat_interleave(group, dim=1) for x in (keys, values))
        scores = torch.einsum("qhd,chd->hqc", query[start:end].float(), keys) * scale
        out.append(torch.einsum("hqc,chd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), values))
    return torch.cat(out).to(query.dtype)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []

    def varlen_attn(*arguments: Any, **asked: Any) -> Tensor:
        # As a GPU sees it.
        on_cuda = [_OnCuda(x) if isinstance(x, Tensor) else x for x in arguments]
        check_arguments(*on_cuda, **{key: _OnCuda(x) if isinstance(x, Tensor) else x for key, x in asked.items()})
        made.append(asked)
        return by_the_textbook(*arguments, **asked)

    monkeypatch.setattr(cuda_attention, "varlen_attn", varlen_attn)
    monkeypatch.setattr(cuda_attention, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(cuda_attention, "FLASH", LATEST)
    return made


class _OnCuda:
    device = torch.device("cuda")

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tensor, name)


def worst_error(rows: list[int], page: int, dim: int, options: AttentionOptions, dtype: torch.dtype) -> float:
    """Against the reference, sequence by sequence; each last context in CONTEXTS."""
    torch.manual_seed(0)
    most = -(-max(CONTEXTS) // page)
    tables = torch.randperm(len(CONTEXTS) * most).view(len(CONTEXTS), most)
    pools = torch.randn(2, tables.numel(), page, KV_HEADS, dim).to(dtype)
    starts = [sum(rows[:at]) for at in range(len(rows) + 1)]
    query = torch.randn(starts[-1], HEADS, dim).to(dtype)
    batch = PagedBatch(
        num_decodes=rows.count(1),
        query_starts=starts,
        context_lens=CONTEXTS,
        block_table_BxM=tables.int(),
        context_lens_B=torch.tensor(CONTEXTS, dtype=torch.int32),
        slots_T=torch.zeros(starts[-1], dtype=torch.long),
        query_starts_B1=torch.tensor(starts, dtype=torch.int32),
    )
    contexts = [
        [pool[table].flatten(0, 1)[:length] for table, length in zip(tables, CONTEXTS, strict=True)] for pool in pools
    ]
    # A chunk that is its whole context may be computed from the step's own keys.
    new = torch.zeros(2, starts[-1], KV_HEADS, dim, dtype=dtype)
    for at, (start, end) in enumerate(pairwise(starts)):
        for side in (0, 1):
            new[side, start:end] = contexts[side][at][-(end - start) :]
    got = CudaAttention(batch, options)(query, new[0], new[1], pools[0], pools[1])
    errors = []
    for at, (start, end) in enumerate(pairwise(starts)):
        first = CONTEXTS[at] - (end - start)
        wanted = reference_attention(query[start:end], contexts[0][at], contexts[1][at], first, options).float()
        errors.append(float((got[start:end].float() - wanted).norm() / wanted.norm()))
    return max(errors)


@pytest.mark.parametrize("flash", [LATEST, OLDEST], ids=["2.13", "2.11"])
@pytest.mark.parametrize("page", [16, 256])
@pytest.mark.parametrize("window", [0, 40, 600])
@pytest.mark.parametrize("rows", [[1, 1, 1, 1], [1, 1, 70, 64]], ids=["decode", "mixed"])
def test_numbers(
    flash: FlashFeatures,
    page: int,
    window: int,
    rows: list[int],
    calls: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda_attention, "FLASH", flash)
    options = AttentionOptions(0.3, window)
    assert worst_error(rows, page, 32, options, torch.bfloat16) < 1e-2
    (asked,) = calls
    # One that is longer than every context is none.
    wanted = (39, 0) if window == 40 else (-1, -1) if rows == [1] * 4 else (-1, 0)
    assert asked["window_size"] == wanted
    in_place = flash is LATEST and page == 256
    assert ("block_table" in asked, "seqused_k" in asked) == (in_place, in_place)
    assert (asked.get("num_splits"), asked.get("enable_gqa")) == ((1, True) if flash is LATEST else (None, None))


@pytest.mark.parametrize(
    ("dim", "options", "dtype", "capability", "why"),
    [
        (64, AttentionOptions(0.3, softcap=5.0), torch.bfloat16, (9, 0), "more than causal attention with a window"),
        (64, AttentionOptions(0.3, chunk=24), torch.bfloat16, (9, 0), "more than causal attention with a window"),
        (36, AttentionOptions(0.3), torch.float16, (9, 0), "head_dim must be a multiple of 8 up to 256, not 36"),
        (512, AttentionOptions(0.3), torch.float16, (9, 0), "head_dim must be a multiple of 8 up to 256, not 512"),
        (64, AttentionOptions(0.3, 40), torch.float32, (9, 0), "float16 and bfloat16, not in float32"),
        (64, AttentionOptions(0.3), torch.float16, (7, 5), "compute capability 7.5, and it needs 8.0"),
    ],
)
def test_what_the_kernel_cannot_do_is_computed_otherwise(
    dim: int,
    options: AttentionOptions,
    dtype: torch.dtype,
    capability: tuple[int, int],
    why: str,
    calls: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda_attention, "_capability", lambda device: capability)
    assert why in why_not_flash(dtype, dim, options, capability)
    assert worst_error([1, 1, 70, 64], 16, dim, options, dtype) < 1e-2
    assert calls == []


def test_an_option_that_the_kernel_was_not_told_of_is_none_of_its_own() -> None:
    """Whatever AttentionOptions holds beside scale and window."""
    plain = AttentionOptions(0.3, 40)
    assert why_not_flash(torch.bfloat16, 64, plain, (9, 0)) == ""
    others = [name for name in vars(plain) if name not in ("scale", "window")]
    for name in others:
        assert why_not_flash(torch.bfloat16, 64, replace(plain, **{name: 3}), (9, 0)) != ""
    assert others


@pytest.mark.parametrize("page", [1, 16, 100, 255, 300])
def test_pages_that_are_not_read_in_place_are_named(page: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"engine.block_size must be a multiple of 256, not {page}" in why_not_pages(page)
    monkeypatch.setattr(cuda_attention, "FLASH", OLDEST)
    assert "no flash attention over pages; 2.12 has" in why_not_pages(256)
