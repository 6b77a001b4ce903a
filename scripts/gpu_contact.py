"""What a GPU says to Tandem, in minutes: one line a check, `name: value | expected`. An error ends its check alone.

usage: python scripts/gpu_contact.py [--shape 8b] [--device cuda] [CHECK...]

Expected values are estimates for an H100 or H200 with torch 2.11 to 2.13 (on 2.11, attention gathers its pages).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kv_transfer.frames.cells import Cells
from tandem.config import parse_config
from tandem.engine.backends.cuda.attention import FLASH, CudaAttention
from tandem.engine.batch import AttentionOptions, PagedBatch
from tandem.engine.engine import Engine
from tandem.engine.sequence import Emission, Failed, Sequence
from tandem.types import EngineRequest, SamplingParams

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))  # last: it has a script of the name kv_transfer
from shapes import SHAPES, write_model  # noqa: E402

# A prompt's tokens, and the steps that are measured after it.
PROMPT, STEPS = 1024, 24


def say(name: str, value: object, expected: str) -> None:
    print(f"{name}: {value} | {expected}", flush=True)


def sync(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def median_ms(call: Callable[[], object], device: str, times: int = 20) -> float:
    took = []
    for _ in range(times + 5):
        sync(device)
        start = time.perf_counter()
        call()
        sync(device)
        took.append((time.perf_counter() - start) * 1e3)
    return statistics.median(took[5:])


def environment(device: str, shape: str) -> None:
    say("torch, CUDA", (torch.__version__, torch.version.cuda), "2.11 or newer")
    say("varlen_attn takes", FLASH, "window alone on 2.11; all but splits on 2.12; all on 2.13")
    if device == "cuda":
        found = torch.cuda.get_device_properties(0)
        facts = (found.name, f"sm_{found.major}{found.minor}", found.multi_processor_count, found.total_memory >> 30)
        say("GPU, capability, processors, GiB", facts, "sm_80 or newer for flash attention")


def attention(device: str, shape: str) -> None:
    """Of one layer, decode: against the time in which the memory could be read."""
    heads, kv_heads, dim, page = 32, 8, 128, 256
    for batch, context in ((1, 4096), (1, 32768), (64, 4096)) if device == "cuda" else ((2, 256),):
        blocks = -(-context // page)
        table = torch.randperm(batch * blocks).view(batch, blocks).int().to(device)
        numbers = partial(torch.tensor, dtype=torch.int32, device=device)
        step = PagedBatch(
            num_decodes=batch,
            query_starts=[*range(batch + 1)],
            context_lens=[context] * batch,
            block_table_BxM=table,
            context_lens_B=numbers([context] * batch),
            slots_T=torch.zeros(batch, dtype=torch.long, device=device),
            query_starts_B1=numbers([*range(batch + 1)]),
        )
        keys, values = torch.randn(2, batch * blocks, page, kv_heads, dim, device=device).bfloat16()
        query = torch.randn(batch, heads, dim, device=device).bfloat16()
        new, plan = query[:, :kv_heads], CudaAttention(step, AttentionOptions(dim**-0.5))
        took = median_ms(partial(plan, query, new, new, keys, values), device)
        floor = batch * context * kv_heads * dim * 4 / 4.3e9
        expected = f"floor {floor:.3f} at 4.3 TB/s; under 4 times it in place, about 6 gathered"
        say(f"attention, {batch} x {context}: ms", f"{took:.3f}", expected)


def engine(device: str, shape: str) -> None:
    """Random weights: how long a step takes, how often it waits, and what the GPU does meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(shape, Path(folder), weights=False)
        settings: dict[str, Any] = {
            "model": {
                "path": str(model),
                "load_format": "dummy",
                "dtype": "bfloat16" if device == "cuda" else "float32",
            },
            "engine": {"device": device, "prefix_cache": False},
        }
        failed: list[Failed] = []

        def publish(emissions: list[Emission]) -> None:
            failed.extend(event for _, event in emissions if isinstance(event, Failed))

        start = time.monotonic()
        made = Engine(parse_config(settings), publish)
        say("engine starts in s", f"{time.monotonic() - start:.1f}", "under 60; random weights, checked against eager")
        tokens = made.pool.num_blocks * made.pool.block_size
        say("KV pool, tokens", tokens, "an H200 beside 8b: about 850,000")
        for batch in (1, 16, 64) if device == "cuda" else (2,):
            measure(made, batch, device)
        say("failed requests", len(failed), "0")


def measure(made: Engine, batch: int, device: str) -> None:
    for index in range(batch):
        prompt = tuple(torch.randint(5, 8000, (PROMPT,)).tolist())
        request = EngineRequest(f"{batch}-{index}", prompt, SamplingParams(max_tokens=STEPS, ignore_eos=True))
        table = made.reserve(request, prefill_here=True)
        made.add(Sequence(request, lambda event: None, decode_here=True, table=table))
    sync(device)
    start = time.perf_counter()
    while made.load.queued_prompt_tokens:
        made.step()
    prefill = batch * PROMPT / (time.perf_counter() - start)
    took: list[float] = []
    while made.has_work:
        if device == "cuda" and len(took) == 8:
            say(f"waits for the GPU in a decode step, batch {batch}", waits(made.step), "1")
        if device == "cuda" and len(took) == 10:
            say("kernels and busy ms of a decode step", kernels(made.step), "about 1,400; 4 to 6 for 8b")
        start = time.perf_counter()
        made.step()
        took.append((time.perf_counter() - start) * 1e3)
    expected = "a step of 8b: 3.8 ms at least (16 GB at 4.3 TB/s), 12 to 25 without CUDA graphs"
    say(f"{batch} x {PROMPT}: prefill tokens/s, decode ms a step", (round(prefill), statistics.median(took)), expected)


def waits(call: Callable[[], object]) -> int:
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in seen)


def kernels(call: Callable[[], object]) -> tuple[int, float]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    events = [event for event in profile.events() or () if event.device_type == torch.autograd.DeviceType.CUDA]
    return len(events), round(sum(event.device_time for event in events) / 1e3, 2)


def kv_copies(device: str, shape: str) -> None:
    layers, tokens = (32, 4096) if device == "cuda" else (2, 256)
    pool = torch.randn(layers, 2, 32, 256, 8, 128, device=device).bfloat16()
    cells = Cells(pool, [*range(32)], range(1), range(tokens))
    payload, _ = cells.pieces().gathered()
    size = len(payload) / 1e6
    say(
        "KV to the host, GB/s",
        round(size / median_ms(lambda: cells.pieces().gathered(), device), 1),
        "3 to 10: crc32 too",
    )
    say(
        "KV to the device, GB/s",
        round(size / median_ms(lambda: cells.scatter(payload), device), 1),
        "3 to 10: crc32 too",
    )


def products(device: str, shape: str) -> None:
    x, w = torch.randn(64, 4096, device=device).bfloat16(), torch.randn(4096, 4096, device=device).bfloat16()
    together = x @ w.T
    differ = sum(not torch.equal((x[row : row + 1] @ w.T)[0], together[row]) for row in range(64))
    say("of 64 rows of a bf16 product, bits depend on the batch in", differ, "not 0: greedy tokens may, too")


CHECKS = {check.__name__: check for check in (environment, attention, kv_copies, products, engine)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=f"some of {', '.join(CHECKS)}; all if none is named")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    options = parser.parse_args()
    if wrong := set(options.checks) - set(CHECKS):
        parser.error(f"there is no check {min(wrong)}")
    broken = 0
    for name in options.checks or CHECKS:
        try:
            CHECKS[name](options.device, options.shape)
        except Exception as error:
            broken += 1
            print(f"FAIL {name}: {type(error).__name__}: {str(error).strip().splitlines()[:1]}", flush=True)
            traceback.print_exc(limit=-4, file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
