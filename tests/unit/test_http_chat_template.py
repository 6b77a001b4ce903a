"""Conversations as prompts: what transformers makes of them, in a sandbox."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from router.http.chat_template import load_chat_template
from router.http.fields import Message, TextPart
from tandem.config import TINY_MODEL, ModelConfig
from tandem.errors import InvalidRequest

HELLO = [Message(role="user", content="hello")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copy(TINY_MODEL / "tokenizer_config.json", tmp_path)
    return tmp_path


def rendered(folder: Path, template: str, messages: list[Message] = HELLO) -> str:
    (folder / "chat_template.jinja").write_text(template)
    found = load_chat_template(ModelConfig(path=str(folder)))
    assert found is not None
    return found.render(messages)


def test_it_is_what_transformers_renders() -> None:
    from transformers import AutoTokenizer

    conversation = [("system", "Be brief."), ("user", " What? "), ("assistant", "That."), ("user", "{{ 1 + 1 }}")]
    template = load_chat_template(ModelConfig(path=str(TINY_MODEL)))
    assert template is not None
    ours = template.render([Message.model_validate({"role": role, "content": text}) for role, text in conversation])
    plain = [{"role": role, "content": text} for role, text in conversation]
    theirs = AutoTokenizer.from_pretrained(TINY_MODEL).apply_chat_template(
        plain, add_generation_prompt=True, tokenize=False
    )
    assert ours == theirs
    assert "{{ 1 + 1 }}" in ours, "a message is no template"


def test_parts_become_lines_and_a_developer_is_a_system(folder: Path) -> None:
    parts = [TextPart(type="text", text="one"), TextPart(type="text", text="two")]
    messages = [Message(role="developer", content=parts, name="me")]
    template = "{% for m in messages %}{{ m.role }}:{{ m.name }}:{{ m.content }}{% endfor %}"
    assert rendered(folder, template, messages) == "system:me:one\ntwo"


def test_a_file_of_its_own_comes_first_and_has_what_transformers_gives(folder: Path) -> None:
    text = "{{ bos_token }}{{ {'ü': messages[0].content} | tojson }}{{ strftime_now('%Y') | length }}"
    loop = "{% for each in 'abc' %}{{ each }}{% break %}{% endfor %}"
    assert rendered(folder, text + loop) == '<s>{"ü": "hello"}4a'


def test_one_that_cannot_be_read_is_none(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "chat_template.jinja").write_text("{% if %}")
    assert load_chat_template(ModelConfig(path=str(folder))) is None
    assert "cannot be read" in caplog.text


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% for i in range(999999999) %}{% endfor %}", "too big"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ messages + 1 }}", "concatenate"),
    ],
)
def test_what_a_template_does_not_take_is_the_caller_s_error(folder: Path, template: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        rendered(folder, template)
    assert caught.value.field == "messages"


@pytest.mark.parametrize("config", ["{", "[]", "{}", json.dumps({"chat_template": [{"name": "rag", "template": "x"}]})])
def test_a_model_without_one(folder: Path, config: str) -> None:
    (folder / "tokenizer_config.json").write_text(config)
    assert load_chat_template(ModelConfig(path=str(folder))) is None


def test_tokens_may_be_objects(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<b>", "lstrip": False}}))
    assert rendered(folder, "{{ bos_token }}") == "<b>"
