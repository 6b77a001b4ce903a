"""A conversation as the model's prompt: its own Jinja template, rendered as transformers does, in a sandbox."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from router.http.fields import Message
from tandem.config import ModelConfig
from tandem.errors import InvalidRequest
from tandem.hub import source_of

log = logging.getLogger(__name__)

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class ChatTemplate:
    def __init__(self, template: Template, special_tokens: dict[str, str]) -> None:
        self._template = template
        self._special_tokens = special_tokens

    def render(self, messages: Sequence[Message]) -> str:
        """Raises InvalidRequest for a conversation that the template does not take."""
        plain = [_plain(message) for message in messages]
        try:
            return self._template.render(messages=plain, add_generation_prompt=True, **self._special_tokens)
        except (TemplateError, TypeError, ArithmeticError) as error:
            words = f"the model's chat template does not take these messages: {str(error)[:200]}"
            raise InvalidRequest(words, field="messages") from None


def _plain(message: Message) -> dict[str, str]:
    """Parts become lines, as with vLLM; `developer` is OpenAI's newer word for `system`."""
    content = message.content
    text = content if isinstance(content, str) else "\n".join(part.text for part in content)
    role = "system" if message.role == "developer" else message.role
    return {"role": role, "content": text, **({} if message.name is None else {"name": message.name})}


def load_chat_template(model: ModelConfig) -> ChatTemplate | None:
    """None when the model has none, or one that cannot be read: the log says why."""
    source = source_of(model.path)
    config = _tokenizer_config(source)
    text = _read(source, "chat_template.jinja") or _default(config.get("chat_template"))
    if text is None:
        return None
    try:
        template = _environment().from_string(text)
    except TemplateError as error:
        log.warning("the chat template of %s cannot be read: %s", source, error)
        return None
    return ChatTemplate(template, {name: _token(config[name]) for name in _SPECIAL_TOKENS if config.get(name)})


def _tokenizer_config(source: str) -> dict[str, Any]:
    try:
        found = json.loads(_read(source, "tokenizer_config.json") or "{}")
    except ValueError as error:
        log.warning("tokenizer_config.json of %s cannot be read: %s", source, error)
        found = {}
    return found if isinstance(found, dict) else {}


def _default(found: Any) -> str | None:
    """One template, or a list of named ones."""
    if isinstance(found, list):
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _token(value: Any) -> str:
    return str(value["content"] if isinstance(value, dict) and "content" in value else value)


def _read(source: str, name: str) -> str | None:
    path = Path(source) / name
    try:
        if not Path(source).is_dir():
            path = Path(hf_hub_download(source, name))
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, EntryNotFoundError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        log.warning("%s of %s cannot be read: %s", name, source, error)
        return None


def _environment() -> ImmutableSandboxedEnvironment:
    """What transformers gives to templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
