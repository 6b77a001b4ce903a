"""One trial: a tiny random model is served exactly as transformers generates, or refused by name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from engine_driver import EngineDriver
from model_zoo import save_random
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig
from zoo_configs import POSITIONS, VOCABULARY, tiny
from zoo_result import Outcome

from tandem.errors import TandemError
from tandem.types import SamplingParams, Token

LENGTHS = (1, 7, 33, 90, 300)
OUTPUT = 8
ONE_CHUNK, MANY_CHUNKS = 512, 24
# Of log probabilities: float32 in another order gives 1e-5, another computation 1e-2 and more.
_TOLERANCE = 1e-3
_BLOCK = 16
# Between log probabilities in all answers: a model that is always or never sure shows nothing.
_LEAST_SPREAD = 0.1
# Between the best token and the next, in all answers: closer than this, the order of a sum decides.
_LEAST_MARGIN = 2e-5
# Of weights and embeddings, one pair after another until a model is of use; attention scores are of 1 and more.
_SIZES = ((0.2, 0.1), (0.1, 0.1), (0.4, 0.1), (0.2, 0.5))


@dataclass(frozen=True)
class Verdict:
    outcome: Outcome
    # The refusal, or what was found, in one line.
    words: str = ""


@dataclass(frozen=True)
class Answer:
    """Greedy tokens with the log probability of each."""

    ids: list[int]
    logprobs: list[float]
    # By how much the least certain token is likelier than the next one; known of transformers' answers alone.
    margin: float = math.inf


def tried(architecture: str, changes: dict[str, Any], folder: Path) -> Verdict:
    """Makes models in `folder`, which is empty, until one has something to say."""
    for seed, sizes in enumerate(_SIZES):
        verdict = _tried_once(architecture, changes, folder / str(seed), seed, *sizes)
        if verdict.outcome is not Outcome.DULL:
            break
    return verdict


def _tried_once(
    architecture: str, changes: dict[str, Any], folder: Path, seed: int, size: float, embeddings: float
) -> Verdict:
    try:
        save_random(tiny(architecture, **changes), folder, seed, size, embeddings, vectors=0.1)
    except Exception as error:  # whatever transformers says of a configuration that makes no model
        return Verdict(Outcome.NO_MODEL, _line(error))
    try:
        whole, chunked = (EngineDriver(folder, max_step_tokens=chunk, threads=1) for chunk in (ONE_CHUNK, MANY_CHUNKS))
    except TandemError as error:
        # What is refused should be a model that would work, at least as it is.
        verdict = _refusal(error)
        broken = _breaks(folder) if verdict.outcome is Outcome.CRASHED or not changes else ""
        return Verdict(Outcome.NO_MODEL, broken) if broken else verdict
    except Exception as error:
        return Verdict(Outcome.CRASHED, f"{type(error).__name__}: {_line(error)}")
    prompts = _prompts(whole.engine.info.max_model_len, min(VOCABULARY, whole.engine.info.vocab_size))
    try:
        wanted = _generated(folder, prompts)
    except Exception as error:
        return Verdict(Outcome.WRONG, f"served, but transformers generates nothing: {_line(error)}")
    logprobs = [logprob for answer in wanted for logprob in answer.logprobs]
    if not max(logprobs) - min(logprobs) > _LEAST_SPREAD:
        return Verdict(Outcome.DULL, "the model is as sure of one answer as of any other")
    if min(answer.margin for answer in wanted) < _LEAST_MARGIN:
        return Verdict(Outcome.DULL, "two tokens are as likely as each other")
    return _compared({"one chunk": whole, "many chunks": chunked}, prompts, wanted)


def _compared(drivers: dict[str, EngineDriver], prompts: list[list[int]], wanted: list[Answer]) -> Verdict:
    reusable = sum((len(prompt) - 1) // _BLOCK * _BLOCK for prompt in prompts)
    for chunks, driver in drivers.items():
        for round_, hits in (("computed", 0), ("prefix hit", reusable)):
            before = driver.engine.load.prefix_hit_tokens
            try:
                answers = _served(driver, prompts)
            except Exception as error:
                return Verdict(Outcome.CRASHED, f"{chunks}, {round_}: {type(error).__name__}: {_line(error)}")
            assert driver.engine.load.prefix_hit_tokens - before == hits
            for prompt, got, want in zip(prompts, answers, wanted, strict=True):
                if difference := _difference(got, want):
                    return Verdict(Outcome.WRONG, f"prompt of {len(prompt)}, {chunks}, {round_}: {difference}")
        assert driver.engine.pool.check_integrity().referenced == 0
    return Verdict(Outcome.EXACT)


def _difference(got: Answer, want: Answer) -> str:
    for index, (ours, theirs) in enumerate(zip(got.logprobs, want.logprobs, strict=True)):
        if got.ids[index] != want.ids[index] or not abs(ours - theirs) <= _TOLERANCE:
            return f"token {index} is {got.ids[index]} at {ours:.4f}, not {want.ids[index]} at {theirs:.4f}"
    return ""


def _refusal(error: TandemError) -> Verdict:
    """Refused in Tandem's words; another exception's words are no reason but a crash in disguise."""
    cause: BaseException | None = error
    while isinstance(cause, TandemError):
        cause = cause.__cause__
    if cause is not None:
        return Verdict(Outcome.CRASHED, f"told as a refusal: {type(cause).__name__}: {_line(cause)}")
    return Verdict(Outcome.REFUSED, _line(error).rpartition(" is refused: ")[2])


def _breaks(folder: Path) -> str:
    """What transformers says where it cannot generate with the model."""
    try:
        _generated(folder, _prompts(POSITIONS, VOCABULARY)[1:2])
    except Exception as error:
        return _line(error)
    return ""


@cache
def _prompts(limit: int, vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in LENGTHS]
    return [prompt for prompt in prompts if len(prompt) + OUTPUT <= limit]


def _generated(folder: Path, prompts: list[list[int]]) -> list[Answer]:
    """Plain transformers, one prompt at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    # Its own may force tokens.
    model.generation_config = GenerationConfig(pad_token_id=0)
    return [_generate(model, prompt) for prompt in prompts]


def _generate(model: Any, prompt: list[int]) -> Answer:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=OUTPUT,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    answer = out.sequences[0, len(prompt) :].tolist()
    logits: Tensor = torch.stack([step[0].float() for step in out.logits])
    best, second = logits.topk(2).values.unbind(-1)
    logprobs = logits.log_softmax(-1).gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
    return Answer(answer, logprobs.tolist(), float((best - second).min()))


def _served(driver: EngineDriver, prompts: list[list[int]]) -> list[Answer]:
    """All prompts in one batch."""
    driver.generate(prompts, SamplingParams(max_tokens=OUTPUT, ignore_eos=True, logprobs=0))
    return [_answer(driver.tokens[str(index)]) for index in range(len(prompts))]


def _answer(tokens: list[Token]) -> Answer:
    return Answer([token.id for token in tokens], [float(token.logprob or 0.0) for token in tokens])


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
