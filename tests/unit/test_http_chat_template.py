"""Conversations as prompts: what a template may do, and what is made of a message before.

What comes out is compared with transformers in test_prompt_conformance.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizer_zoo import make

from router.doors.http.chat_template import ChatTemplate, chat_template_of
from router.doors.http.fields import Message, TextPart
from tandem.config import ModelConfig
from tandem.errors import InvalidRequest
from tandem.tokenizer import load_tokenizer

HELLO = [Message(role="user", content="hello")]


def template_of(folder: Path, text: str) -> ChatTemplate | None:
    make("tiny", folder)
    (folder / "chat_template.jinja").write_text(text)
    return chat_template_of(load_tokenizer(ModelConfig(path=str(folder))))


def rendered(folder: Path, text: str, messages: list[Message] = HELLO) -> str:
    template = template_of(folder, text)
    assert template is not None
    return template.render(messages)


def test_a_developer_is_a_system_unless_the_template_knows_it(tmp_path: Path) -> None:
    messages = [Message(role="developer", content=[TextPart(type="text", text="one")], name="me")]
    template = "{% for m in messages %}{{ m.role }}:{{ m.name }}:{{ m.content }}{% endfor %}"
    assert rendered(tmp_path / "a", template, messages) == "system:me:one"
    assert rendered(tmp_path / "b", "{# a developer's #}" + template, messages) == "developer:me:one"


def test_what_an_assistant_thought_reaches_the_template(tmp_path: Path) -> None:
    messages = [Message(role="assistant", content="x", reasoning="so"), Message(role="user", content="y")]
    template = "{% for m in messages %}<{{ m.reasoning_content }}>{{ m.content }}{% endfor %}"
    assert rendered(tmp_path, template, messages) == "<so>x<>y"


def test_a_message_is_no_template(tmp_path: Path) -> None:
    assert (
        rendered(tmp_path, "{{ messages[0].content }}", [Message(role="user", content="{{ 1 + 1 }}")]) == "{{ 1 + 1 }}"
    )


def test_one_that_cannot_be_read_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert template_of(tmp_path, "{% if %}") is None
    assert f"no chat: chat_template.jinja in {tmp_path} cannot be read: Expected an expression" in caplog.text
    assert "line 1" in caplog.text


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% for i in range(999999999) %}{% endfor %}", "too big"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ messages + 1 }}", "concatenate"),
        ("{{ 'abc'.index('x') }}", "substring not found"),
        ("{{ {}['a'].b }}", "no attribute"),
        ("{% macro again(x) %}{{ again(x) }}{% endmacro %}{{ again(1) }}", "recursion"),
    ],
)
def test_what_a_template_does_not_take_is_the_caller_s_error(tmp_path: Path, template: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        rendered(tmp_path, template)
    assert caught.value.field == "messages"
