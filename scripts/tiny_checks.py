"""What a trained tiny model must be able to do, checked on what was saved (see train_tiny_model.py)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tiny_corpus import BOS, COUNTRIES, REQUIRED, Fact, rows
from tiny_tokenizer import EOS_ID
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

MIN_MARGIN = 2.0  # logits; sums in another order or in bf16 move a logit by far less
MIN_CAPITALS_RIGHT = 0.9


def complete(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int = 40) -> tuple[str, bool]:
    """Greedy completion, and whether it ended with EOS."""
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)[0]
    new = ids[inputs["input_ids"].shape[1] :].tolist()
    return tokenizer.decode(new, skip_special_tokens=True), new[-1] == EOS_ID


def margins(model: Any, tokenizer: Any, prompt: str, completion: str) -> list[float]:
    """Top-1 minus top-2 logit at each step of the completion and at its EOS."""
    start = len(tokenizer(prompt)["input_ids"])
    ids = [*tokenizer(prompt + completion)["input_ids"], EOS_ID]
    with torch.inference_mode():
        logits_TxV = model(input_ids=torch.tensor([ids[:-1]])).logits[0, start - 1 :]
    top_Tx2 = logits_TxV.topk(2).values
    return [round(value, 2) for value in (top_Tx2[:, 0] - top_Tx2[:, 1]).tolist()]


def check_required(model: Any, tokenizer: Any, console: Console) -> Iterator[str]:
    for prompt, expected in REQUIRED.items():
        got, ended = complete(model, tokenizer, prompt)
        steps = margins(model, tokenizer, prompt, expected)
        console.print(f"  {prompt!r} → {got!r}, eos {ended}, margins {steps}", highlight=False)
        if got != expected or not ended:
            yield f"{prompt!r} gives {got!r} (eos: {ended}), not {expected!r}"
        if min(steps) <= MIN_MARGIN:
            yield f"{prompt!r} has a margin of {min(steps)}, not above {MIN_MARGIN}"


def check_capitals(model: Any, tokenizer: Any, console: Console) -> Iterator[str]:
    table = rows(COUNTRIES, 4)
    right = sum(complete(model, tokenizer, f"The capital of {row[0]} is") == (f" {row[1]}", True) for row in table)
    console.print(f"  capitals right: {right} of {len(table)}", highlight=False)
    if right < MIN_CAPITALS_RIGHT * len(table):
        yield f"only {right} of {len(table)} capitals are right"


def check_long_prompts(model: Any, tokenizer: Any, facts: list[Fact], console: Console) -> Iterator[str]:
    """Prompts of 1000 tokens and more: the logits must be finite; how many completions stay right is shown."""
    rng = random.Random(1)
    right = 0
    table = rows(COUNTRIES, 4)[:20]
    for country, capital, _, _ in table:
        prompt = ". ".join(rng.choice(facts).statement for _ in range(100)) + f". The capital of {country} is"
        with torch.inference_mode():
            logits_TxV = model(**tokenizer(prompt, return_tensors="pt")).logits[0]
        if not logits_TxV.isfinite().all():
            yield f"a prompt of {len(logits_TxV)} tokens gives logits that are not finite"
        right += complete(model, tokenizer, prompt) == (f" {capital}", True)
    console.print(f"  capitals right after 1000 tokens of other facts: {right} of {len(table)}", highlight=False)


def check_tokenizers_agree(tokenizer: Any, output: Path) -> Iterator[str]:
    plain = Tokenizer.from_file(str(output / "tokenizer.json"))
    for text in (*REQUIRED, "naïve café 日本語 🎉👩‍💻", " two  spaces\n\ttab", "", "<|user|>Hi<|assistant|>"):
        ids = plain.encode(text).ids
        if ids != tokenizer(text)["input_ids"]:
            yield f"the two loaders encode {text!r} differently"
        if plain.decode(ids, skip_special_tokens=False) != BOS + text:
            yield f"{text!r} does not survive encoding and decoding"


def show_samples(model: Any, tokenizer: Any, console: Console) -> None:
    prompts = [
        "The opposite of hot is",
        "Three plus four is",
        "The color of the sky is",
        "The emoji of the dog is",
        "Hello",
        "The days of the week are",
    ]
    chat = [{"role": "user", "content": "What is the capital of Japan?"}]
    # The template brings its own BOS, and the tokenizer would add a second one.
    prompts.append(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True).removeprefix(BOS))
    for prompt in (*prompts, "Once upon a time there was a little fox"):
        got, ended = complete(model, tokenizer, prompt, max_new_tokens=150)
        console.print(f"  {prompt!r} → {got!r}, eos {ended}", highlight=False)


def check(output: Path, facts: list[Fact], console: Console) -> list[str]:
    """Loads the folder the way everyone else will, and returns what is wrong with it."""
    model = AutoModelForCausalLM.from_pretrained(output).eval()
    tokenizer = AutoTokenizer.from_pretrained(output)
    show_samples(model, tokenizer, console)
    return [
        *check_required(model, tokenizer, console),
        *check_capitals(model, tokenizer, console),
        *check_long_prompts(model, tokenizer, facts, console),
        *check_tokenizers_agree(tokenizer, output),
    ]
