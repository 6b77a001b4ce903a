"""A conversation as the model's prompt: its own Jinja template, which transformers finds and renders in its sandbox."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from router.http.fields import Message
from tandem.errors import InvalidRequest

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
        plain = [self._plain(message) for message in messages]
        try:
            if any(isinstance(each["content"], list) for each in plain):
                plain = self._with_joined(plain)
            return str(self._tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # a template's own, and whatever Python says of what it does
            words = f"the model's chat template does not take these messages: {str(error)[:200]}"
            raise InvalidRequest(words, field="messages") from None

    def _plain(self, message: Message) -> dict[str, Any]:
        found = message.model_dump(exclude_none=True)
        return {**found, "role": self._renamed.get(message.role, message.role)}

    def _with_joined(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The parts of a message become lines, as with vLLM, where the template does not look at them one by one."""
        noting = [{**each, "content": _noting(each["content"])} for each in messages]
        try:
            self._compiled.render(
                messages=noting,
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._tokenizer.special_tokens_map,
            )
            taken = [not isinstance(each["content"], _Parts) or each["content"]._looked_at for each in noting]
        except Exception:  # a template that takes text only says so in its own way
            taken = [isinstance(each["content"], str) for each in messages]
        return [each if fits else _joined(each) for each, fits in zip(messages, taken, strict=True)]


class _Parts(list[Any]):
    """Notes that a template has looked at one of the parts; asking whether it could (`is iterable`) is not that."""

    _looked_at = False

    def __iter__(self) -> Iterator[Any]:
        for part in super().__iter__():
            self._looked_at = True
            yield part

    def __reversed__(self) -> Iterator[Any]:
        return iter(self[::-1])

    def __getitem__(self, place: Any) -> Any:
        self._looked_at = True
        return super().__getitem__(place)


def _noting(content: Any) -> Any:
    return _Parts(content) if isinstance(content, list) else content


def _joined(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "content": "\n".join(part["text"] for part in message["content"])}


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
        log.warning("the chat template of %s cannot be read: %s", tokenizer.name_or_path, error)
        return None
