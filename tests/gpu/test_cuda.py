"""The CUDA paths, where there is a GPU: same tokens as transformers, the attention kernels, KV across the split."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_driver import EngineDriver
from model_zoo import save_model
from transformers import AutoModelForCausalLM

from tandem.types import SamplingParams

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [[5, 6, 7], list(range(3, 60)), [9] * 200]
LONG = SamplingParams(max_tokens=16, ignore_eos=True)


def _wanted(path: Path) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval().cuda()
    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt], device="cuda")
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
        answers.append(out[0, len(prompt) :].tolist())
    return answers


def _fresh(*command: str) -> subprocess.Popen[str]:
    """A process that is no copy of another one: CUDA does not survive a fork."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([sys.executable, "-m", *command], text=True, env=environment, cwd=ROOT, **pipes)


def _in_dtype(path: Path, dtype: str) -> Path:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "dtype": dtype}))
    return path


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2", "qwen3", "gpt2", "mixtral"])
@pytest.mark.parametrize("chunk", [512, 24])
def test_fp32_tokens_equal_transformers(architecture: str, chunk: int, tmp_path: Path) -> None:
    path = save_model(architecture, tmp_path)
    driver = EngineDriver(path, device="cuda", max_step_tokens=chunk)
    assert driver.generate(PROMPTS, SamplingParams(max_tokens=16)) == _wanted(path)


@pytest.mark.parametrize("page", [16, 256])
@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("rows", [(1, 70), (1, 1)], ids=["mixed", "decode"])
def test_attention_is_as_the_reference_has_it(page: int, window: int, rows: tuple[int, int]) -> None:
    """Pages of 256 are read in place from torch 2.12 on; others are gathered."""
    from tandem.engine.backends.cuda.attention import CudaAttention, why_not_flash
    from tandem.engine.backends.torch_attention import reference_attention
    from tandem.engine.batch import AttentionOptions, PagedBatch

    heads, kv_heads, dim, contexts = 8, 2, 64, [300, 400]
    torch.manual_seed(0)
    most = -(-max(contexts) // page)
    tables = torch.randperm(2 * most).view(2, most)
    pools = torch.randn(2, 2 * most, page, kv_heads, dim, device="cuda", dtype=torch.bfloat16)
    starts = [0, rows[0], sum(rows)]
    query = torch.randn(sum(rows), heads, dim, device="cuda", dtype=torch.bfloat16)
    batch = PagedBatch(
        num_decodes=rows.count(1),
        query_starts=starts,
        context_lens=contexts,
        block_table_BxM=tables.int().cuda(),
        context_lens_B=torch.tensor(contexts, dtype=torch.int32, device="cuda"),
        slots_T=torch.zeros(sum(rows), dtype=torch.long, device="cuda"),
        query_starts_B1=torch.tensor(starts, dtype=torch.int32, device="cuda"),
    )
    options = AttentionOptions(dim**-0.5, window)
    assert why_not_flash(query.dtype, dim, options, torch.cuda.get_device_capability()) == ""
    new = torch.empty(sum(rows), kv_heads, dim, device="cuda", dtype=torch.bfloat16)
    got = CudaAttention(batch, options)(query, new, new, pools[0], pools[1])
    for index, context in enumerate(contexts):
        keys, values = (pool.cpu()[tables[index]].flatten(0, 1)[:context] for pool in pools)
        mine = slice(starts[index], starts[index + 1])
        wanted = reference_attention(query[mine].cpu(), keys, values, context - rows[index], options)
        assert torch.allclose(got[mine].cpu().float(), wanted.float(), atol=2e-2, rtol=2e-2), index


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_starts_and_is_near_transformers(dtype: str, tmp_path: Path) -> None:
    path = _in_dtype(save_model("llama", tmp_path), dtype)
    driver = EngineDriver(path, device="cuda", kv_memory_mib=64)
    fingerprint = driver.engine.fingerprint
    assert (fingerprint.block_size, fingerprint.dtype) == (256, dtype)
    told = replace(LONG, logprobs=1)
    together = driver.generate(PROMPTS, told)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval().cuda()
    for index, prompt in enumerate(PROMPTS):
        logits = model(torch.tensor([prompt], device="cuda")).logits[0, -1].float()
        first = driver.tokens[str(index)][0]
        assert first.logprob is not None
        assert abs(first.logprob - float(logits.log_softmax(-1)[first.id])) < 0.1
    # The same batch again gives the same; another batch need not: cuBLAS chooses its kernels by the number of rows.
    assert driver.generate(PROMPTS, told) == together


def test_the_pool_takes_what_the_gpu_has_left(tmp_path: Path) -> None:
    driver = EngineDriver(_in_dtype(save_model("llama", tmp_path), "bfloat16"), device="cuda", kv_memory_mib=0)
    free, total = torch.cuda.mem_get_info()
    assert 0.01 * total < free < 0.2 * total
    assert len(driver.generate(PROMPTS, LONG)[0]) == 16


def test_a_decode_step_waits_once_for_the_gpu(tmp_path: Path) -> None:
    driver = EngineDriver(_in_dtype(save_model("llama", tmp_path), "bfloat16"), device="cuda", kv_memory_mib=64)
    for name in "abc":
        driver.add(name, PROMPTS[1], replace(LONG, temperature=0.8, top_p=0.9, seed=1))
    while driver.engine.load.queued_prompt_tokens:
        driver.engine.step()
    driver.engine.step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            driver.engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(warning.message) for warning in seen if "synchroniz" in str(warning.message)]
    assert len(waits) == 1, waits


def test_a_lost_device_is_told_from_a_bug() -> None:
    """In a process of its own, whose GPU context does not outlive it."""
    script = """
import torch
from tandem.engine.backends.backend import backend_for, is_lost
from tandem.out_of_memory import is_out_of_memory
try:
    torch.empty(1 << 60, dtype=torch.uint8, device="cuda")
except RuntimeError as error:
    assert is_out_of_memory(error) and not is_lost(error, backend_for("cuda")), repr(error)
try:
    torch.zeros(2, device="cuda") @ torch.zeros(3, device="cuda")
except RuntimeError as error:
    assert not is_lost(error, backend_for("cuda")), repr(error)
try:
    torch.zeros(1, device="cuda")[torch.tensor([5], device="cuda")].cpu()
except RuntimeError as error:
    print("lost" if is_lost(error, backend_for("cuda")) else repr(error))
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=90, check=False)
    assert ended.stdout.strip() == "lost", ended.stderr[-2000:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kv_leaves_and_enters_gpu_memory_bit_by_bit(dtype: torch.dtype) -> None:
    from kv_transfer.frames.cells import Cells

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
    from kv_transfer.frames.cells import Cells
    from kv_transfer.frames.int8 import Int8
    from kv_transfer.frames.layout import KVLayout

    wire = Int8(KVLayout(3, 2, 64, 16, dtype))
    pool = torch.randn(3, 2, 8, 16, 2, 64, device="cuda").to(getattr(torch, dtype))
    cells = Cells(pool, [5, 2, 7], range(1, 3), range(3, 40))
    payload, checksum = wire.pieces(cells).gathered()
    assert payload == wire.pieces(replace(cells, pool=pool.cpu())).gathered()[0]
    there, here = torch.zeros_like(pool), torch.zeros_like(pool, device="cpu")
    assert wire.scatter(replace(cells, pool=there), payload, checksum)
    assert wire.scatter(replace(cells, pool=here), payload, checksum)
    assert torch.equal(there.cpu(), here)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prefill_and_decode_share_one_gpu(dtype: str, tmp_path: Path) -> None:
    from service import running_service

    model = _in_dtype(save_model("llama", tmp_path / "model"), dtype)
    engine: dict[str, Any] = {"device": "cuda", "devices": [0], "kv_memory_mib": 64}
    with running_service(tmp_path / "split", model, launch=_fresh, engine=engine) as service:
        for prompt, wanted in zip(PROMPTS, _wanted(model), strict=True):
            answer = service.client.complete(prompt, max_tokens=16).choices[0]
            assert len(answer.tokens) == len(wanted)
            assert dtype != "float32" or [token.id for token in answer.tokens] == wanted
            assert answer.report.kv_bytes > 0
