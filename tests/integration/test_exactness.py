"""The exactness table (law 1): transformers.generate = colocated = disaggregated, for twelve architectures.

Every cell is served by real processes over real sockets. Prompts of 1, 7, 33 and 200 tokens run in one batch, in one
chunk or in many, twice: the second time with a prefix-cache hit.
"""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import ARCHITECTURES, save_model
from service import Service, fresh, running_service, wait_until
from transformers import AutoModelForCausalLM

import tandem

OUTPUT = 32
ONE_CHUNK, MANY_CHUNKS = 512, 24
SHAPES = {"disaggregated": {"prefill": 1, "decode": 1}, "colocated": {"prefill": 0, "decode": 0, "colocated": 1}}


def _prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 128, (length,), generator=generator).tolist() for length in (1, 7, 33, 200)]


def _wanted(model_path: Path, prompts: list[list[int]], **settings: Any) -> list[list[int]]:
    """Plain transformers, one prompt at a time, with settings of its own. A later end of sequence ends an answer."""
    model = AutoModelForCausalLM.from_pretrained(model_path, attn_implementation="eager").eval()
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=OUTPUT, do_sample=False, **settings)
        answers.append(out[0, len(prompt) :].tolist())
    return answers


def _served(service: Service, prompts: list[list[int]], **sampling: Any) -> list[list[int]]:
    """All prompts at once."""

    def one(prompt: list[int]) -> list[int]:
        completion = service.client.complete(prompt, max_tokens=OUTPUT, **sampling)
        return [token.id for token in completion.choices[0].tokens]

    with ThreadPoolExecutor(len(prompts)) as threads:
        return list(threads.map(one, prompts))


def _hit_prefixes(service: Service) -> bool:
    """Of the prompts of 33 and 200 tokens: 2 and 12 whole blocks of 16, once heartbeats have told."""
    return sum(worker.load.prefix_hit_tokens for worker in service.status().workers) == 32 + 192


# The first one's workers compile their kernels where numba's cache is cold: a minute on two cores.
@pytest.mark.timeout(300)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_tokens_equal_transformers(architecture: str, tmp_path: Path) -> None:
    model = save_model(architecture, tmp_path / "model")
    prompts = _prompts()
    wanted = _wanted(model, prompts)
    assert len({token for answer in wanted for token in answer}) >= 8, "the model says too little to tell paths apart"
    with ExitStack() as stack:
        services = {
            (shape, chunk): stack.enter_context(
                running_service(
                    tmp_path / f"{shape}-{chunk}", model, wait=False, engine={"max_step_tokens": chunk}, **counts
                )
            )
            for shape, counts in SHAPES.items()
            for chunk in (ONE_CHUNK, MANY_CHUNKS)
        }
        for (shape, chunk), service in services.items():
            service.wait_joined(sum(SHAPES[shape].values()))
            for attempt in ("computed", "prefix hit"):
                assert _served(service, prompts) == wanted, (shape, chunk, attempt)
            wait_until(partial(_hit_prefixes, service), what="a prefix-cache hit in the second round")


def _favourites(answers: list[list[int]]) -> list[int]:
    """The tokens that stand in most answers, best first."""
    return [token for token, _ in Counter(token for answer in answers for token in set(answer)).most_common(3)]


@pytest.mark.timeout(300)
def test_greedy_tokens_with_penalties_equal_transformers(tmp_path: Path) -> None:
    """What transformers.generate can do to the logits as we do; presence and frequency penalties it does not know."""
    model = save_model("llama", tmp_path / "model")
    prompts = _prompts()
    plain = _wanted(model, prompts)
    banned, disliked, liked = _favourites(plain)
    bias = {banned: -100.0, disliked: -1.5, liked: 1.5}
    rows: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
        ({"repetition_penalty": 0.8}, {"repetition_penalty": 0.8}),
        ({"logit_bias": bias}, {"sequence_bias": {(token,): value for token, value in bias.items()}}),
        # The likeliest token as the end of sequence, so that answers would be short.
        ({"min_tokens": 12, "stop_token_ids": (banned,)}, {"min_new_tokens": 12, "eos_token_id": [2, banned]}),
    ]
    with running_service(tmp_path / "service", model, engine={"max_step_tokens": MANY_CHUNKS}) as service:
        for ours, theirs in rows:
            wanted = _wanted(model, prompts, **theirs)
            assert wanted != plain, (theirs, "changes nothing")
            assert _served(service, prompts, **ours) == wanted, ours


def test_seeded_sampling_is_the_same_everywhere(tmp_path: Path) -> None:
    """Alone, in a batch of 16, colocated and disaggregated; in processes that begin as a user's do, with nothing."""
    model = save_model("llama", tmp_path / "model")
    prompt = _prompts()[2]
    seeds = range(16)
    answers = {}
    for shape, counts in SHAPES.items():
        with running_service(tmp_path / shape, model, launch=fresh, **counts) as service:

            def answer(seed: int, service: Service = service) -> list[int]:
                params = tandem.SamplingParams(
                    max_tokens=OUTPUT, temperature=0.9, top_p=0.95, seed=seed, ignore_eos=True
                )
                return [token.id for token in service.client.complete(prompt, sampling=params).choices[0].tokens]

            answers[shape, "alone"] = [answer(seed) for seed in seeds]
            with ThreadPoolExecutor(len(seeds)) as threads:
                answers[shape, "together"] = list(threads.map(answer, seeds))
    first = answers["disaggregated", "alone"]
    assert all(other == first for other in answers.values())
    assert len({tuple(tokens) for tokens in first}) == len(seeds)
