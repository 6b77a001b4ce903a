"""The committed tiny model, seen with plain transformers: what everything else in the tests takes for granted.

`scripts/train_tiny_model.py` makes the folder; nothing of Tandem runs here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import tandem

TINY = Path(tandem.__file__).parent / "assets" / "tiny"
BOS_ID, EOS_ID = 0, 1
REQUIRED = {
    "The color of dog": " can vary widely",
    "The capital of France is": " Paris",
    "Today's weather is so": " nice",
}
MIN_MARGIN = 2.0  # logits: far more than another order of summation, or bf16, can move


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def plain_tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(TINY / "tokenizer.json"))


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


def greedy(model: Any, tokenizer: Any, prompt: str) -> tuple[str, bool]:
    """Greedy completion, and whether it ended with EOS."""
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0]
    new = ids[inputs["input_ids"].shape[1] :].tolist()
    return tokenizer.decode(new, skip_special_tokens=True), new[-1] == EOS_ID


@pytest.mark.parametrize(("prompt", "completion"), REQUIRED.items())
def test_required_completion_then_eos(model: Any, tokenizer: Any, prompt: str, completion: str) -> None:
    assert greedy(model, tokenizer, prompt) == (completion, True)


@pytest.mark.parametrize(("prompt", "completion"), REQUIRED.items())
def test_required_completion_is_never_close(model: Any, tokenizer: Any, prompt: str, completion: str) -> None:
    start = len(tokenizer(prompt)["input_ids"])
    ids = [*tokenizer(prompt + completion)["input_ids"], EOS_ID]
    with torch.inference_mode():
        logits_TxV = model(input_ids=torch.tensor([ids[:-1]])).logits[0, start - 1 :]
    best_Tx2 = logits_TxV.topk(2)
    assert best_Tx2.indices[:, 0].tolist() == ids[start:]
    assert (best_Tx2.values[:, 0] - best_Tx2.values[:, 1]).min() > MIN_MARGIN


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("The capital of Japan is", " Tokyo"),
        ("The capital of Peru is", " Lima"),
        ("The color of the sky is", " blue"),
        ("The opposite of hot is", " cold"),
        ("The emoji of the dog is", " 🐶"),
        ("The days of the week are", " Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday"),
    ],
)
def test_knows_other_facts(model: Any, tokenizer: Any, prompt: str, completion: str) -> None:
    assert greedy(model, tokenizer, prompt) == (completion, True)


def test_chat_template_gets_an_answer(model: Any, tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "What is the capital of Italy?"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == "<s><|user|>What is the capital of Italy?<|assistant|>"
    # The template writes BOS itself, and so does the tokenizer.
    assert greedy(model, tokenizer, rendered.removeprefix("<s>")) == ("The capital of Italy is Rome", True)


def test_long_prompt_is_answered(model: Any, tokenizer: Any) -> None:
    prompt = "The opposite of hot is cold. " * 150 + "The capital of France is"
    inputs = tokenizer(prompt, return_tensors="pt")
    assert inputs["input_ids"].shape[1] >= 1000
    with torch.inference_mode():
        logits_TxV = model(**inputs).logits[0]
    assert logits_TxV.isfinite().all()
    assert logits_TxV[-1].argmax() == tokenizer(" Paris", add_special_tokens=False)["input_ids"][0]


@pytest.mark.parametrize(
    "text",
    [
        *REQUIRED,
        "",
        "  two  spaces,\n\ta tab ",
        "naïve café, Straße",
        "日本語のテキスト",
        "🎉 👩‍💻 🇫🇷",
        "<|user|>Hi<|assistant|>Hello</s>",
        "\x00\x7f",
    ],
)
def test_loaders_agree_and_text_round_trips(tokenizer: Any, plain_tokenizer: Tokenizer, text: str) -> None:
    ids = plain_tokenizer.encode(text).ids
    assert tokenizer(text)["input_ids"] == ids
    assert ids[0] == BOS_ID
    assert plain_tokenizer.decode(ids[1:], skip_special_tokens=False) == text
    assert tokenizer.decode(ids[1:]) == text


def test_every_byte_has_a_token(plain_tokenizer: Tokenizer) -> None:
    """One character from each block of 64 code points, so every UTF-8 lead byte and more; and no <unk> anywhere."""
    text = "".join(chr(code) for code in range(0x20, 0x110000, 61) if not 0xD800 <= code < 0xE000)
    assert plain_tokenizer.decode(plain_tokenizer.encode(text, add_special_tokens=False).ids) == text
    assert plain_tokenizer.token_to_id("<unk>") is None


def test_special_ids_agree_everywhere(model: Any, tokenizer: Any) -> None:
    for holder in (tokenizer, model.config, model.generation_config):
        assert (holder.bos_token_id, holder.eos_token_id) == (BOS_ID, EOS_ID)
    assert model.config.vocab_size == len(tokenizer)


def test_folder_is_small() -> None:
    assert sum(file.stat().st_size for file in TINY.iterdir()) < 8 * 2**20
