"""Are our figures, lengths and arrivals those of vLLM? Both compute them from the same made-up answers and seeds.

usage: PYTHONPATH=. VENV/bin/python benchmarks/vllm_definitions.py

VENV is a virtual environment with vLLM. Nothing is served: this calls the functions behind `vllm bench serve`, and ends
with an error if one number differs.
"""

from __future__ import annotations

import asyncio
import random
import sys
from types import SimpleNamespace

import numpy as np
from vllm.benchmarks import serve
from vllm.benchmarks.datasets.utils import get_sampling_params
from vllm.benchmarks.lib.endpoint_request_func import RequestFuncOutput

from loadtest.metrics import Outcome, summarize
from loadtest.schedule.arrivals import drawn
from loadtest.schedule.workloads import Lengths, Vocabulary, random_requests

PERCENTILES = (50, 90, 99, 99.9)
GOODPUT = {"ttft": 300.0, "tpot": 60.0, "e2el": 900.0}
DURATION_S = 20.0
SAME_NAMES = "completed failed request_throughput request_goodput output_throughput total_token_throughput"
SAME_NAMES += " max_output_tokens_per_s max_concurrent_requests"


def made_up_answers(count: int) -> list[tuple[Outcome, RequestFuncOutput]]:
    """Some fail, some have one token, some bring several tokens at once."""
    draw = random.Random(1)
    answers = []
    for index in range(count):
        sent_s, ttft_s = 1000 + index * 0.05, draw.expovariate(5)
        gaps_s = [draw.expovariate(20) for _ in range(draw.choice([0, 0, 1, 4, 29]))]
        arrivals_s = np.cumsum([sent_s + ttft_s, *gaps_s]).tolist()
        tokens, failed = len(arrivals_s) * draw.choice([1, 1, 2]), draw.random() < 0.1
        ours = Outcome(sent_s, 50 + index, sent_s, arrivals_s, tokens)
        if failed:
            ours.set_failure("made_up", "made up")
        theirs = RequestFuncOutput(
            success=not failed,
            latency=arrivals_s[-1] - sent_s,
            output_tokens=tokens,
            ttft=ttft_s,
            itl=gaps_s,
            prompt_len=50 + index,
            start_time=sent_s,
        )
        answers.append((ours, theirs))
    return answers


def their_figures(outputs: list[RequestFuncOutput]) -> dict[str, float]:
    found, _ = serve.calculate_metrics([], outputs, DURATION_S, None, list(PERCENTILES), GOODPUT)
    figures = {name: getattr(found, name) for name in SAME_NAMES.split()}
    figures |= {"total_input_tokens": found.total_input, "total_output_tokens": found.total_output}
    for name in ("ttft", "tpot", "itl", "e2el"):
        figures |= {f"{head}_{name}_ms": getattr(found, f"{head}_{name}_ms") for head in ("mean", "median", "std")}
        figures |= {f"p{at:g}_{name}_ms": value for at, value in getattr(found, f"percentiles_{name}_ms")}
    return figures


def their_lengths(count: int, lengths: Lengths, seed: int) -> list[tuple[int, int]]:
    tokenizer = SimpleNamespace(num_special_tokens_to_add=lambda: 0, vocab_size=1000)
    drawn_lengths = get_sampling_params(
        np.random.default_rng(seed), count, lengths.range_ratio, lengths.input_tokens, lengths.output_tokens, tokenizer
    )
    return list(zip(drawn_lengths[0].tolist(), drawn_lengths[1].tolist(), strict=True))


def their_arrivals(count: int, rate_rps: float, burstiness: float, seed: int) -> list[float]:
    """On a clock that only its sleeps advance."""
    now_s = 0.0

    async def sleep(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds

    async def all_of_them() -> list[float]:
        return [now_s async for _ in serve.get_request([SimpleNamespace()] * count, rate_rps, burstiness)]

    serve.time, serve.asyncio = SimpleNamespace(time=lambda: now_s), SimpleNamespace(sleep=sleep)
    np.random.seed(seed)
    return asyncio.run(all_of_them())


def main() -> None:
    answers = made_up_answers(300)
    ours = summarize([each for each, _ in answers], DURATION_S, PERCENTILES, GOODPUT)
    theirs = their_figures([each for _, each in answers])
    apart = [name for name, value in theirs.items() if not np.isclose(ours[name], value, rtol=1e-9)]
    lengths = Lengths(100, 30, 0.3)
    requests = random_requests(200, lengths, Vocabulary(1000, seed=7))
    if [(len(each.prompt_ids), each.output_tokens) for each in requests] != their_lengths(200, lengths, 7):
        apart.append("lengths")
    apart += [
        f"arrivals of burstiness {burstiness}"
        for burstiness in (0.5, 1.0, 4.0)
        if not np.allclose(drawn(200, 10, burstiness, 3), their_arrivals(200, 10, burstiness, 3), rtol=1e-9)
    ]
    if apart:
        sys.exit(f"not those of vLLM: {', '.join(apart)}")
    print(f"the same: {len(theirs)} figures of 300 answers, 200 lengths, 3 × 200 arrivals")


if __name__ == "__main__":
    main()
