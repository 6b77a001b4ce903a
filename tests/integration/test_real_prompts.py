"""A checkpoint with habits of public ones, served by real processes: prompts, ends and stops as with transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from service import Service, fresh, running_service
from tokenizer_zoo import edit
from transformers import AutoModelForCausalLM, AutoTokenizer

from tandem.config import TINY_MODEL

TEXT = "The capital of France is a very long prompt that has many many words in it"
USER = 4  # <|user|>
TEMPLATE = """\
{%- macro text(content) -%}
{%- if content is string %}{{ content }}{% else %}{% for p in content %}{{ p.text }}{% endfor %}{% endif -%}
{%- endmacro -%}
{{- bos_token }}{% if tools is not none %}TOOLS{% endif %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}{% generation %}<|assistant|>{{ text(m.content) }}{{ eos_token }}{% endgeneration %}
{%- else %}<|{{ m.role }}|>{{ text(m.content) | trim }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""
CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {
        "role": "user",
        "content": [{"type": "text", "text": "What is the capital"}, {"type": "text", "text": " of France?"}],
    },
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model: its tokenizer cuts and pads, its template is rich, its end is known to its tokenizer alone."""
    folder = tmp_path_factory.mktemp("habits") / "habits"
    shutil.copytree(TINY_MODEL, folder)
    cut = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    edit(folder / "tokenizer.json", lambda found: found.update(truncation=cut))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    edit(folder / "config.json", lambda found: found.update(eos_token_id=2))
    (folder / "generation_config.json").unlink()
    return folder


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[Service]:
    with running_service(tmp_path_factory.mktemp("run"), folder, prefill=0, decode=0, colocated=1) as service:
        yield service


def generated(folder: Path, ids: list[int]) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=[2, tokenizer.eos_token_id],
        pad_token_id=0,
    )
    tokens: list[int] = found[0, len(ids) :].tolist()
    return tokens


def post(service: Service, path: str, **fields: Any) -> dict[str, Any]:
    body = {"temperature": 0, "max_tokens": 12, "return_token_ids": True, **fields}
    response = httpx.post(service.http + path, json=body, timeout=60)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_a_text_is_encoded_whole_and_the_tokenizer_s_end_ends_it(service: Service, folder: Path) -> None:
    ids = AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]
    answer = post(service, "/v1/completions", prompt=TEXT)
    assert answer["usage"]["prompt_tokens"] == len(ids) > 8
    assert answer["choices"][0]["token_ids"] == generated(folder, ids)
    told = service.client.complete(TEXT, max_tokens=12)
    assert told.usage.prompt_tokens == len(ids)
    assert [token.id for token in told.choices[0].tokens] == generated(folder, ids)


def test_a_chat_is_apply_chat_template_s(service: Service, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    answer = post(service, "/v1/chat/completions", messages=CHAT)
    assert answer["usage"]["prompt_tokens"] == len(ids)
    choice = answer["choices"][0]
    assert (choice["token_ids"], choice["finish_reason"]) == (generated(folder, ids), "stop")
    assert choice["token_ids"][-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("skip", [True, False])
def test_a_stop_string_that_is_a_special_token(service: Service, skip: bool) -> None:
    asked = {"prompt": "Once upon", "stop": ["<|user|>"], "logit_bias": {str(USER): 100}, "skip_special_tokens": skip}
    choice = post(service, "/v1/completions", **asked)["choices"][0]
    assert (choice["text"], choice["token_ids"], choice["stop_reason"]) == ("", [USER], "<|user|>")


def test_usage_in_every_chunk(service: Service) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": [5, 6, 7], "max_tokens": 6, "ignore_eos": True, "n": 2, "stream": True, "stream_options": options}
    response = httpx.post(f"{service.http}/v1/completions", json=body, timeout=60)
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: {")]
    *chunks, last = [json.loads(line) for line in lines]
    counts: dict[int, list[int]] = {0: [], 1: []}
    for chunk in chunks:
        assert chunk["usage"]["prompt_tokens"] == 3
        assert chunk["usage"]["total_tokens"] == 3 + chunk["usage"]["completion_tokens"]
        counts[chunk["choices"][0]["index"]].append(chunk["usage"]["completion_tokens"])
    assert [(found, found[-1]) for found in counts.values()] == [(sorted(found), 6) for found in counts.values()]
    assert last["usage"]["completion_tokens"] == 12


def test_without_max_tokens_an_answer_is_as_long_as_there_is_room(service: Service) -> None:
    answer = post(service, "/v1/completions", prompt=[7] * 2045, max_tokens=None, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 3


def test_the_router_s_process_holds_no_torch(folder: Path, tmp_path: Path) -> None:
    """Where torch is installed, and a tokenizer and a chat template are loaded, in a process that is nobody's copy."""
    import importlib.util

    assert importlib.util.find_spec("torch") is not None
    with running_service(tmp_path / "run", folder, prefill=0, decode=0, launch=fresh) as service:
        maps = Path(f"/proc/{service.router.pid}/maps").read_text()
        assert "tokenizers" in maps
        assert "torch" not in maps


def test_a_tokenizer_that_would_not_be_served_exactly_ends_the_router(folder: Path, tmp_path: Path) -> None:
    spoiled = tmp_path / "spoiled"
    shutil.copytree(folder, spoiled)
    edit(spoiled / "tokenizer_config.json", lambda found: found.update(tokenizer_class="ByT5Tokenizer"))
    with fresh("router", "--port", "0", "--http-port", "-1", "--model", str(spoiled)) as router:
        assert router.wait(60) == 2
        assert router.stdout is not None
        assert (
            "error: spoiled is refused: its tokenizer would not be served exactly: ByT5Tokenizer"
            in router.stdout.read()
        )
