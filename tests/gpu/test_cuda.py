"""The CUDA paths, where there is a GPU: same tokens as transformers, the page-reading kernel, KV across the split."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_driver import EngineDriver
from model_zoo import save_model
from transformers import AutoModelForCausalLM

from tandem.types import SamplingParams

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

PROMPTS = [[5, 6, 7], list(range(3, 60)), [9] * 200]


def _wanted(path: Path) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval().cuda()
    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt], device="cuda")
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
        answers.append(out[0, len(prompt) :].tolist())
    return answers


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2", "qwen3", "gpt2", "mixtral"])
@pytest.mark.parametrize("chunk", [512, 24])
def test_fp32_tokens_equal_transformers(architecture: str, chunk: int, tmp_path: Path) -> None:
    path = save_model(architecture, tmp_path)
    driver = EngineDriver(path, device="cuda", max_step_tokens=chunk)
    assert driver.generate(PROMPTS, SamplingParams(max_tokens=16)) == _wanted(path)


@pytest.mark.parametrize("window", [0, 40])
def test_the_kernel_reads_pages_as_the_reference_does(window: int) -> None:
    from tandem.engine.batch import AttentionOptions, PagedBatch
    from tandem.engine.cpu_attention import reference_attention
    from tandem.engine.cuda_attention import PAGE_MULTIPLE, paged_attention_cuda

    heads, kv_heads, dim, page = 8, 2, 64, PAGE_MULTIPLE
    torch.manual_seed(0)
    pools = torch.randn(2, 6, page, kv_heads, dim, device="cuda", dtype=torch.bfloat16)
    # One decode row over 300 tokens, one chunk of 70 rows that ends a context of 400.
    tables, contexts, starts = [[4, 1], [0, 3]], [300, 400], [0, 1, 71]
    query = torch.randn(71, heads, dim, device="cuda", dtype=torch.bfloat16)
    batch = PagedBatch(
        num_decodes=1,
        query_starts=starts,
        context_lens=contexts,
        block_table_BxM=torch.tensor(tables, dtype=torch.int32, device="cuda"),
        context_lens_B=torch.tensor(contexts, dtype=torch.int32, device="cuda"),
        slots_T=torch.zeros(71, dtype=torch.long, device="cuda"),
        query_starts_B1=torch.tensor(starts, dtype=torch.int32, device="cuda"),
    )
    options = AttentionOptions(dim**-0.5, window)
    new = torch.empty(71, kv_heads, dim, device="cuda", dtype=torch.bfloat16)
    got = paged_attention_cuda(query, new, new, pools[0], pools[1], batch, options)
    for index, (table, context) in enumerate(zip(tables, contexts, strict=True)):
        keys, values = (pool[table].flatten(0, 1)[:context].cpu() for pool in pools)
        rows = slice(starts[index], starts[index + 1])
        first = context - (rows.stop - rows.start)
        wanted = reference_attention(query[rows].cpu(), keys, values, first, options)
        assert torch.allclose(got[rows].cpu().float(), wanted.float(), atol=2e-2, rtol=2e-2), index


def test_bf16_takes_the_kernel_and_repeats_itself(tmp_path: Path) -> None:
    path = save_model("llama", tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    driver = EngineDriver(path, device="cuda", kv_memory_mib=64)
    assert driver.engine.fingerprint.block_size == 256
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    together = driver.generate(PROMPTS, params)
    assert together == [driver.generate([prompt], params)[0] for prompt in PROMPTS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kv_leaves_and_enters_gpu_memory_bit_by_bit(dtype: torch.dtype) -> None:
    from kv_transfer.cells import Cells

    source = torch.randn(3, 2, 8, 16, 2, 32, device="cuda").to(dtype)
    target = torch.zeros_like(source)
    payload, checksum = Cells(source, [5, 2, 7], range(1, 3), range(3, 40)).pieces().gathered()
    assert Cells(target, [0, 6, 1], range(1, 3), range(3, 40)).scatter(payload) == checksum == zlib.crc32(payload)
    for position in range(3, 40):
        at, to = [5, 2, 7][position // 16], [0, 6, 1][position // 16]
        assert torch.equal(source[1:, :, at, position % 16], target[1:, :, to, position % 16])
    assert not target[0].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_on_the_gpu_is_int8_on_the_host(dtype: str) -> None:
    from kv_transfer.cells import Cells
    from kv_transfer.int8 import Int8
    from kv_transfer.layout import KVLayout

    wire = Int8(KVLayout(3, 2, 64, 16, dtype))
    pool = torch.randn(3, 2, 8, 16, 2, 64, device="cuda").to(getattr(torch, dtype))
    cells = Cells(pool, [5, 2, 7], range(1, 3), range(3, 40))
    payload, checksum = wire.pieces(cells).gathered()
    assert payload == wire.pieces(replace(cells, pool=pool.cpu())).gathered()[0]
    there, here = torch.zeros_like(pool), torch.zeros_like(pool, device="cpu")
    assert wire.scatter(replace(cells, pool=there), payload, checksum)
    assert wire.scatter(replace(cells, pool=here), payload, checksum)
    assert torch.equal(there.cpu(), here)


def test_prefill_and_decode_share_one_gpu(tmp_path: Path) -> None:
    from service import running_service

    model = save_model("llama", tmp_path / "model")
    with running_service(tmp_path / "split", model, engine={"device": "cuda", "kv_memory_mib": 64}) as service:
        for prompt, wanted in zip(PROMPTS, _wanted(model), strict=True):
            answer = service.client.complete(prompt, max_tokens=16).choices[0]
            assert [token.id for token in answer.tokens] == wanted
            assert answer.report.kv_bytes > 0
