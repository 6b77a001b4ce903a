"""For wire_dtype.py: int8's copies on one core, and greedy answers from KV that went through int8; one line of JSON.

wire_dtype_side.py FOLDER       with the config.json of the 160M shape
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from kv_transfer.frames.cells import Cells, Native
from kv_transfer.frames.layout import KVLayout, cut
from kv_transfer.frames.wire_dtype import wire_dtype
from tandem.config import TINY_MODEL, parse_config
from tandem.engine.backends.backend import tune_process

SEED = 7
BLOCK = 16
# As prefill makes KV final, and as the configuration cuts frames.
CHUNK, FRAME_BYTES = 512, 1 << 20
# Tokens of an answer; and steps in which both sides are given the same tokens, to compare their logits.
ANSWER, FORCED = 64, 32
# Heads and their size, of pools of 12 layers.
SHAPES = {"float32": (12, 64), "bfloat16": (8, 128), "float16": (8, 128)}
POOL_TOKENS = 1024


def frames(wire: Native, layers: int, tokens: int) -> list[tuple[range, range]]:
    chunks = [range(start, min(start + CHUNK, tokens)) for start in range(0, tokens, CHUNK)]
    return [frame for chunk in chunks for frame in cut(range(layers), chunk, FRAME_BYTES // wire.cell_bytes)]


# Copies.


def copies() -> list[dict[str, Any]]:
    return [_copies(dtype, *shape) for dtype, shape in SHAPES.items()]


def _copies(dtype: str, heads: int, head_dim: int) -> dict[str, Any]:
    layout = KVLayout(12, heads, head_dim, BLOCK, dtype)
    pool = torch.randn(12, 2, POOL_TOKENS // BLOCK, BLOCK, heads, head_dim).to(layout.torch_dtype)
    target, blocks = torch.zeros_like(pool), torch.randperm(pool.shape[2]).tolist()
    native, int8 = wire_dtype("native", layout), wire_dtype("int8", layout)
    sources = [Cells(pool, blocks, *frame) for frame in frames(int8, 12, POOL_TOKENS)]
    targets = [replace(cells, pool=target) for cells in sources]
    sent = [int8.pieces(cells).gathered() for cells in sources]

    def gather(wire: Native) -> None:
        for cells in sources:
            wire.pieces(cells).gathered()

    def write() -> None:
        for cells, (payload, checksum) in zip(targets, sent, strict=True):
            int8.scatter(cells, payload, checksum)

    gigabytes = pool.nbytes / 1e9
    return {
        "dtype": dtype,
        "bytes_share": sum(len(payload) for payload, _ in sent) / pool.nbytes,
        "gather": gigabytes / seconds_of(lambda: gather(native)),
        "quantize": gigabytes / seconds_of(lambda: gather(int8)),
        "write": gigabytes / seconds_of(write),
    }


def seconds_of(work: Callable[[], None]) -> float:
    """Median of some, after one to warm up."""
    taken = []
    for _ in range(8):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


# Answers.


def tiny() -> tuple[Any, Tensor]:
    """Prompts of the model's own making: the text that it knows."""
    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL).eval()
    torch.manual_seed(SEED)
    start = torch.full((16, 1), model.config.bos_token_id)
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": 255, "min_new_tokens": 255, "pad_token_id": 2}
    return model, model.generate(start, attention_mask=torch.ones_like(start), **settings)


def random_160m() -> tuple[Any, Tensor]:
    """Random weights, and prompts of random tokens."""
    config = AutoConfig.from_pretrained(sys.argv[1])
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(config).eval()
    return model, torch.randint(3, config.vocab_size, (6, 512))


def answers(name: str, model: Any, prompts: Tensor) -> dict[str, Any]:
    out = model(prompts, use_cache=True, logits_to_keep=1)
    first = out.logits[:, -1:].argmax(-1)
    native = [(layer.keys, layer.values) for layer in out.past_key_values.layers]
    came, share = through_int8(native)
    wanted, wanted_logits = decode(model, native, first)
    got, _ = decode(model, came, first)
    _, forced_logits = decode(model, came, first, given=wanted)
    off, exact = (forced_logits - wanted_logits)[:, :FORCED], wanted_logits[:, :FORCED]
    l2 = off.norm(dim=-1) / exact.norm(dim=-1)
    same = got == wanted
    diverged = [row.tolist().index(False) + 1 for row in same if not row.all()]
    return {
        "model": name,
        "prompts": len(prompts),
        "prompt_tokens": prompts.shape[1],
        "bytes_share": share,
        "logit_l2": l2.mean().item(),
        "logit_l2_most": l2.max().item(),
        "logit_most": off.abs().max().item(),
        "logit_range": (exact.amax(-1) - exact.amin(-1)).mean().item(),
        "margin": (exact.topk(2).values @ torch.tensor([1.0, -1.0])).median().item(),
        "tokens_forced_equal": (forced_logits.argmax(-1) == wanted_logits.argmax(-1)).float().mean().item(),
        "tokens_equal": same.float().mean().item(),
        "answers_equal": int(same.all(1).sum()),
        # Of the answers that diverge, the median place of the first other token; the prefill's own is 0.
        "first_divergence": statistics.median(diverged) if diverged else None,
    }


def through_int8(cache: list[tuple[Tensor, Tensor]]) -> tuple[list[tuple[Tensor, Tensor]], float]:
    """The cache as it arrives, and the share of its bytes that travelled."""
    # [L, 2, B, K, T, D] to [B, L, 2, T, K, D]
    rows = torch.stack([torch.stack(pair) for pair in cache]).permute(2, 0, 1, 4, 3, 5)
    sent = 0
    came = []
    for each in rows:
        one, size = _through_int8(each)
        came.append(one)
        sent += size
    arrived = torch.stack(came).permute(1, 2, 0, 4, 3, 5)
    return [(pair[0], pair[1]) for pair in arrived], sent / (rows.numel() * rows.itemsize)


def _through_int8(rows: Tensor) -> tuple[Tensor, int]:
    layers, _, tokens, heads, head_dim = rows.shape
    layout = KVLayout(layers, heads, head_dim, BLOCK, "float32")
    count = -(-tokens // BLOCK)
    pool = torch.zeros(layers, 2, count, BLOCK, heads, head_dim)
    pool.flatten(2, 3)[:, :, :tokens] = rows
    target, wire, sent = torch.zeros_like(pool), wire_dtype("int8", layout), 0
    for frame in frames(wire, layers, tokens):
        cells = Cells(pool, range(count), *frame)
        payload, checksum = wire.pieces(cells).gathered()
        assert wire.scatter(replace(cells, pool=target), payload, checksum)
        sent += len(payload)
    return target.flatten(2, 3)[:, :, :tokens], sent


def decode(
    model: Any, cache: list[tuple[Tensor, Tensor]], first: Tensor, given: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Tokens [B, ANSWER] that follow the first, and the logits behind them; greedy, or fed with the given tokens."""
    past = DynamicCache()
    for layer, (keys, values) in enumerate(cache):
        past.update(keys.clone(), values.clone(), layer)
    token, tokens, logits = first, [], []
    for step in range(ANSWER):
        out = model(token, past_key_values=past, use_cache=True).logits[:, -1:]
        token = out.argmax(-1)
        tokens.append(token)
        logits.append(out)
        if given is not None:
            token = given[:, step : step + 1]
    return torch.cat(tokens, 1), torch.cat(logits, 1)


@torch.inference_mode()
def main() -> None:
    tune_process(parse_config({}).engine)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    copied = copies()
    torch.set_num_threads(threads)
    made = {"tiny": tiny, "random 160M": random_160m}
    found = [answers(name, *make()) for name, make in made.items()]
    print(json.dumps({"copies": copied, "answers": found}), flush=True)


if __name__ == "__main__":
    main()
