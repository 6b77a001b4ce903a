"""What may stand in a request's body. OpenAI's names, and vLLM's for what OpenAI has not."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Set
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from tandem.errors import InvalidRequest
from tandem.types import MAX_CHOICES, MAX_LOGIT_BIASES, MAX_STOP_STRINGS, MAX_STOP_TOKEN_IDS, shown

# One body may ask for so many completions at once.
MAX_PROMPTS = 128
MAX_MESSAGES = 2048
# OpenAI's own default of /v1/completions.
COMPLETION_TOKENS = 16

# Fields of OpenAI's and vLLM's that mean something that this server lacks, and the values beside NOTHING that ask for
# nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none",),
    "functions": (),
    "metadata": (),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_cache_key": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": (),
    "verbosity": (),
    "web_search_options": (),
    # vLLM's from here.
    "add_generation_prompt": (True,),
    "allowed_token_ids": (),
    "bad_words": (),
    "chat_template": (),
    "chat_template_kwargs": (),
    "continue_final_message": (False,),
    "documents": (),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "priority": (0,),
    "prompt_logprobs": (),
    "return_tokens_as_token_ids": (False,),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}
# Values of a field that ask for nothing whatever it means: clients send whole objects, with all that their types have.
NOTHING: tuple[Any, ...] = (None, [], {})
# Fields of the other endpoint, by what they are called here, where spelling would not find it.
_ELSEWHERE = {"max_completion_tokens": "max_tokens"}


# The first wrong one of a list's entries is told: pydantic would take seconds to describe a million of them.
FIRST = Field(fail_fast=True)


def brief(value: object) -> str:
    """A value in an error message. It may be as large as a body, so it is not written out to be cut."""
    return reprlib.repr(value)[:60] if isinstance(value, list | dict) else shown(value)


def _asked(sent: Any, known: Set[str]) -> Any:
    """Less unknown names that ask for nothing; of a million that ask for something one stays, to be refused."""
    if not isinstance(sent, dict) or sent.keys() <= known:
        return sent
    refused = min((name for name in sent.keys() - known if sent[name] not in NOTHING), default=None)
    return {name: value for name, value in sent.items() if name in known or name == refused}


class Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _without_what_asks_for_nothing(cls, sent: Any) -> Any:
        return _asked(sent, cls.model_fields.keys())


class StreamOptions(Fields):
    include_usage: bool = False
    # vLLM's: every chunk has the usage so far.
    continuous_usage_stats: bool = False
    # Padding against those who guess tokens by the size of chunks: true asks for it, and there is none.
    include_obfuscation: Literal[False] | None = None


def _listed(value: object) -> object:
    """One string is a list of one."""
    return [value] if isinstance(value, str) else value


def _unless_false(value: object) -> object:
    """The other endpoint's word for none."""
    return None if value is False else value


def _few_biases(value: object) -> object:
    if isinstance(value, dict) and len(value) > MAX_LOGIT_BIASES:
        raise InvalidRequest(f"logit_bias must have at most {MAX_LOGIT_BIASES} entries", field="logit_bias")
    return value


class OpenAIRequest(Fields):
    """What both endpoints take. Limits that are missing here are checked where gRPC's are: by admission."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Annotated[list[str], FIRST, Field(max_length=MAX_STOP_STRINGS), BeforeValidator(_listed)] | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], BeforeValidator(_few_biases)] | None = None
    seed: int | None = None
    user: str | None = None
    # From here on vLLM's, and Tandem's cache_salt.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: Annotated[list[int], FIRST, Field(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    # Choices carry the ids of their tokens too.
    return_token_ids: bool | None = None
    cache_salt: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_what_asks_for_nothing(cls, sent: Any) -> Any:
        """Raises InvalidRequest for what is unknown, or asks for something that is not supported."""
        if not isinstance(sent, dict):
            return sent
        asked = {name for name in sent.keys() - cls.model_fields.keys() if sent[name] not in NOTHING}
        for name in asked & UNSUPPORTED.keys():
            if sent[name] not in UNSUPPORTED[name]:
                words = f"{name} is not supported by this server (its value was {brief(sent[name])})"
                raise InvalidRequest(words, field=name)
        if unknown := asked - UNSUPPORTED.keys():
            name, known = min(unknown), list(cls.model_fields)
            near = [_ELSEWHERE[name]] if name in _ELSEWHERE else difflib.get_close_matches(name[:100], known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InvalidRequest(f"{shown(name)[1:-1]} is no field of this request{hint}", field=name[:100])
        return {name: value for name, value in sent.items() if name in cls.model_fields}

    @property
    def names(self) -> dict[str, str]:
        """The client's names of fields that are called otherwise behind the door."""
        return {"user_tag": "user"}

    @property
    def streamed(self) -> bool:
        return bool(self.stream)

    @property
    def usage_in_stream(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def usage_in_chunks(self) -> bool:
        options = self.stream_options
        return options is not None and options.include_usage and options.continuous_usage_stats


class CompletionRequest(OpenAIRequest):
    # One or many, as text or as token ids: prompts.py looks into it.
    prompt: Any
    # Log probabilities of each chosen token, and of so many most probable ones.
    logprobs: Annotated[int | None, BeforeValidator(_unless_false)] = None


class TextPart(BaseModel):
    """A message may have a hundred thousand, and pydantic's calls of Python add up: Message has a validator for all."""

    model_config = Fields.model_config

    type: Literal["text"]
    text: str


class Message(Fields):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], FIRST]
    name: str | None = None
    # What an assistant thought, as vLLM and others answer it: for templates that look at it.
    reasoning_content: str | None = None
    reasoning: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_what_asks_for_nothing(cls, sent: Any) -> Any:
        """An answer may be null, as some servers send one without text: templates take text only."""
        if not isinstance(sent, dict):
            return sent
        content = sent.get("content")
        if content is None and sent.get("role") == "assistant":
            sent = {**sent, "content": ""}
        elif isinstance(content, list):
            parts = TextPart.model_fields.keys()
            sent = {**sent, "content": [_asked(part, parts) for part in content]}
        return _asked(sent, cls.model_fields.keys())


class ChatRequest(OpenAIRequest):
    messages: Annotated[list[Message], FIRST, Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    @property
    def names(self) -> dict[str, str]:
        """The prompt is what the template makes of the messages."""
        most = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        return {**super().names, "logprobs": "top_logprobs", "max_tokens": most, "prompt": "messages"}
