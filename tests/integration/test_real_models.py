"""Real checkpoints, one prefill and one decode worker: the tokens that transformers generates in float32."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from service import Service, running_service, wait_until
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
# Outside of the repository: made once, from packages.
MADE = Path(os.environ.get("TANDEM_TEST_MODELS", "~/.cache/tandem/test_models")).expanduser()
MAKING_S = 900
CANNOT_DOWNLOAD = 75
OUTPUT = 16
# Prompts longer than this go in several chunks.
CHUNK = 128
BLOCK = 16
# Gemma's window is 512 tokens: one prompt is past it, one reaches it while it is answered.
LENGTHS = {"smollm2": (5, 60, 300), "gemma3": (5, 505, 600)}
QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
JOURNAL = "\n".join(
    f"Day {day}: the ship made {day * 37 % 90 + 11} miles under a {wind} wind; the cook counted {day * 7 + 3} loaves."
    for day, wind in enumerate(["northern", "gentle", "warm", "cold", "western"] * 6)
)


@dataclass(frozen=True)
class Real:
    path: Path
    prompts: list[list[int]]
    # transformers' answers to the prompts, and to the question.
    answers: list[list[int]]
    chat: list[int]
    service: Service


@pytest.fixture(scope="module", params=LENGTHS)
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    path = made(request.param)
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = tokenizer(JOURNAL).input_ids
    # Each begins elsewhere, so that none finds another's blocks; the first token may be one that begins every text.
    starts_and_lengths = enumerate(LENGTHS[request.param], 1)
    prompts = [text[:1] + text[start * 20 :][: length - 1] for start, length in starts_and_lengths]
    assert [len(prompt) for prompt in prompts] == list(LENGTHS[request.param])
    question = asked(tokenizer) if tokenizer.chat_template else []
    answers, chat = generated(path, prompts, question)
    engine = {"kv_memory_mib": 192, "max_step_tokens": CHUNK}
    with running_service(tmp_path_factory.mktemp(request.param), path, engine=engine) as service:
        yield Real(path, prompts, answers, chat, service)


@cache
def made(name: str) -> Path:
    """The model's directory; skips without a network, unless this is CI."""
    if not (MADE / name).exists():
        command = [sys.executable, ROOT / "scripts" / "small_models.py", MADE, name]
        code = subprocess.run(command, check=False, timeout=MAKING_S).returncode
        if code == CANNOT_DOWNLOAD and not os.environ.get("CI"):
            pytest.skip(f"{name} cannot be downloaded here")
        assert code == 0
    return MADE / name


def asked(tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    return ids


def generated(path: Path, prompts: list[list[int]], question: list[int]) -> tuple[list[list[int]], list[int]]:
    """transformers' answers, of a model that is gone when they are here: it is large."""
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()

    answers = [answer(model, prompt, OUTPUT) for prompt in prompts]
    chat = answer(model, question, 64) if question else []
    del model
    gc.collect()
    return answers, chat


def answer(model: Any, prompt: list[int], tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    new: list[int] = out[0, len(prompt) :].tolist()
    return new


# The models may have to be made first.
@pytest.mark.timeout(MAKING_S + 300)
def test_the_split_generates_what_transformers_does(real: Real) -> None:
    """All prompts in one batch; the second time from the prefix cache."""
    client = real.service.client

    def served(prompt: list[int]) -> list[int]:
        return [token.id for token in client.complete(prompt, max_tokens=OUTPUT).choices[0].tokens]

    reusable = sum((len(prompt) - 1) // BLOCK * BLOCK for prompt in real.prompts)
    with ThreadPoolExecutor(len(real.prompts)) as threads:
        for attempt in ("computed", "prefix hit"):
            assert list(threads.map(served, real.prompts)) == real.answers, attempt

    def hits() -> int:
        return sum(worker.load.prefix_hit_tokens for worker in real.service.status().workers)

    wait_until(lambda: hits() == reusable, what="prefix hits in the second round")


@pytest.mark.timeout(MAKING_S + 300)
def test_a_chat_ends_where_its_template_does(real: Real) -> None:
    tokenizer = AutoTokenizer.from_pretrained(real.path)
    if not tokenizer.chat_template:
        pytest.skip("a model without a chat template")
    with openai.OpenAI(base_url=f"{real.service.http}/v1", api_key="none", max_retries=0) as client:
        completion = client.chat.completions.create(
            model=real.path.name,
            messages=QUESTION,
            temperature=0,
            max_tokens=64,
            extra_body={"return_token_ids": True},
        )
    [choice] = completion.choices
    ids = choice.model_extra["token_ids"]
    assert ids == real.chat
    assert choice.finish_reason == "stop"
    assert tokenizer.decode(ids[-1:]) == "<|im_end|>"
    assert choice.message.content == tokenizer.decode(ids[:-1])
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == len(asked(tokenizer))
