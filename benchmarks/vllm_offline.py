"""The other side of benchmarks/engine.py: vLLM's engine, run by the Python of a virtual environment that has it.

usage: VENV/bin/python vllm_offline.py MODEL_DIR --dtype float32 --threads 2 < cases
Cases and rates are those of engine_side.py.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from itertools import pairwise
from typing import Any


def load(options: argparse.Namespace) -> Any:
    # vLLM reads its settings from the environment when it is imported.
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "2"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{options.threads - 1}" if options.threads > 1 else "0"
    from vllm import LLM

    return LLM(
        options.model,
        dtype=options.dtype,
        max_model_len=4096,
        enable_prefix_caching=False,
        disable_log_stats=True,
        skip_tokenizer_init=True,
    )


def answer(llm: Any, case: str) -> dict[str, float]:
    from vllm import SamplingParams

    batch, given, output = map(int, case.split("x"))
    engine = llm.llm_engine
    params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True, detokenize=False)
    started = time.perf_counter()
    for index in range(batch):
        prompt = {"prompt_token_ids": [random.randrange(5, 8000) for _ in range(given)]}
        engine.add_request(f"{case}-{index}-{random.getrandbits(64)}", prompt, params)
    row: dict[str, float] = {}
    begun: set[str] = set()
    full: list[float] = []
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter()
        everyone_had_begun = len(begun) == batch
        begun |= {each.request_id for each in outputs}
        if not row and len(begun) == batch:
            row["prefill_tok_s"] = batch * given / (now - started)
        if everyone_had_begun and len(outputs) == batch:
            full.append(now)
    if len(full) > 1:
        row["decode_tok_s"] = batch / statistics.median(after - before for before, after in pairwise(full))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    llm = load(parser.parse_args())
    for warm_up in ("2x64x4", "1x1024x1", "8x512x1"):
        answer(llm, warm_up)
    print(json.dumps({"ready": {}}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(llm, line.strip())), flush=True)


if __name__ == "__main__":
    main()
