"""A conversation as the model's prompt: its own Jinja template, which transformers finds and renders in its sandbox."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError

from router.doors.http.fields import Message
from tandem.errors import InvalidRequest
from tandem.model_files import CHAT_TEMPLATE

log = logging.getLogger(__name__)


class ChatTemplate:
    def __init__(self, tokenizer: Any, source: str) -> None:
        """source: of the template."""
        from transformers.utils.chat_template_utils import _compile_jinja_template

        self._tokenizer = tokenizer
        self._compiled = _compile_jinja_template(source)
        # `developer` is OpenAI's newer word for `system`; few templates know it.
        self._renamed = {} if "developer" in source else {"developer": "system"}

    def render(self, messages: Sequence[Message]) -> str:
        """Raises InvalidRequest for a conversation that the template does not take."""
        plain = [
            {**message.model_dump(exclude_none=True), "role": self._renamed.get(message.role, message.role)}
            for message in messages
        ]
        try:
            if any(isinstance(each["content"], list) for each in plain):
                plain = self._with_joined(plain)
            return str(self._tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # a template's own, and whatever Python says of what it does
            words = f"the model's chat template does not take these messages: {str(error)[:200]}"
            raise InvalidRequest(words, field="messages") from None

    def _with_joined(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The parts of a message become lines, as with vLLM, where the template does not look at them one by one."""
        lines: set[str] = set()
        while True:
            tried = [_joined(each) if each["role"] in lines else _noting(each) for each in messages]
            done = self._takes(tried)
            parts = [(each["role"], each["content"]) for each in tried if isinstance(each["content"], _TemplateParts)]
            left = [role for role, content in parts if not content.read]
            if done or not left:
                break
            # A template that takes text only says so in its own way; for this role, it seems. There are four.
            lines.add(left[0])
        return [
            each if isinstance(trial["content"], _TemplateParts) and trial["content"].read else _joined(each)
            for each, trial in zip(messages, tried, strict=True)
        ]

    def _takes(self, messages: list[dict[str, Any]]) -> bool:
        """As apply_chat_template renders, which would make plain lists of the parts."""
        given = self._tokenizer.special_tokens_map
        try:
            self._compiled.render(messages=messages, tools=None, documents=None, add_generation_prompt=True, **given)
        except Exception:
            return False
        return True


class _TemplateParts(list[Any]):
    """Notes that a template has looked at one of the parts; asking whether it could (`is iterable`) is not that."""

    _read = False

    @property
    def read(self) -> bool:
        return self._read

    def __iter__(self) -> Iterator[Any]:
        for part in super().__iter__():
            self._read = True
            yield part

    def __reversed__(self) -> Iterator[Any]:
        return iter(self[::-1])

    def __getitem__(self, place: Any) -> Any:
        """Jinja also asks so for names that are no attributes of a list."""
        self._read = self._read or isinstance(place, int | slice)
        return super().__getitem__(place)


def _noting(message: dict[str, Any]) -> dict[str, Any]:
    content = message["content"]
    return {**message, "content": _TemplateParts(content)} if isinstance(content, list) else message


def _joined(message: dict[str, Any]) -> dict[str, Any]:
    content = message["content"]
    return message if isinstance(content, str) else {**message, "content": "\n".join(part["text"] for part in content)}


def chat_template_of(tokenizer: Any) -> ChatTemplate | None:
    """None when the model has none, or one that cannot be read: the log says why. tokenizer: transformers'."""
    try:
        source = tokenizer.get_chat_template()
    except ValueError as error:
        log.info("no chat template in %s: %s", tokenizer.name_or_path, error)
        return None
    try:
        return ChatTemplate(tokenizer, source)
    except Exception as error:  # no template at all, or none that Jinja can parse
        folder = tokenizer.name_or_path
        file = CHAT_TEMPLATE if Path(folder, CHAT_TEMPLATE).is_file() else "the chat template"
        where = f" (line {error.lineno})" if isinstance(error, TemplateSyntaxError) else ""
        log.warning("no chat: %s in %s cannot be read: %s%s", file, folder, " ".join(str(error).split()), where)
        return None
