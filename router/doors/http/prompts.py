"""What a body's fields ask of the orchestrator: one GenerateRequest for each prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from router.doors.http.fields import (
    COMPLETION_TOKENS,
    MAX_PROMPTS,
    ChatRequest,
    CompletionRequest,
    OpenAIRequest,
    brief,
)
from tandem.errors import InvalidRequest
from tandem.types import SamplingParams, shown
from tandem.v1 import generation_pb2
from tandem.wire import sampling_to_wire

# OpenAI samples unless told otherwise; Tandem's own default is greedy.
TEMPERATURE = 1.0
# A chat answer may be as long as the model's length allows, but blocks are reserved for all of it: so much, if nothing
# is said.
CHAT_TOKENS = 1024
# Fields that have the same name and meaning in SamplingParams.
_SAME = (
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "min_tokens",
    "ignore_eos",
)
Prompt = bytes | list[int]


def completion_requests(
    body: CompletionRequest, prompts: Sequence[Prompt], max_model_len: int
) -> list[generation_pb2.GenerateRequest]:
    """prompts: what prompts_of found, texts as token ids where max_tokens is not said. Raises InvalidRequest."""
    requests = []
    for prompt in prompts:
        max_tokens = _room(COMPLETION_TOKENS, prompt, max_model_len) if body.max_tokens is None else body.max_tokens
        requests.append(_message(body, _sampling(body, max_tokens, body.logprobs), prompt))
    return requests


def chat_request(body: ChatRequest, prompt_ids: list[int], max_model_len: int) -> generation_pb2.GenerateRequest:
    """Raises InvalidRequest."""
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true", field="top_logprobs")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    asked = {body.max_tokens, body.max_completion_tokens} - {None}
    if len(asked) > 1:
        words = "max_tokens is the old name of max_completion_tokens: say one of them, or both with the same value"
        raise InvalidRequest(words, field="max_completion_tokens")
    max_tokens = asked.pop() if asked else None
    if max_tokens is None:
        max_tokens = _room(CHAT_TOKENS, prompt_ids, max_model_len)
    return _message(body, _sampling(body, max_tokens, logprobs), prompt_ids)


def _room(most: int, prompt: Prompt, max_model_len: int) -> int:
    """What the model's length leaves, at most so many tokens."""
    return max(1, min(most, max_model_len - len(prompt)))


def _sampling(body: OpenAIRequest, max_tokens: int, logprobs: int | None) -> SamplingParams:
    given: dict[str, Any] = {name: value for name in _SAME if (value := getattr(body, name)) is not None}
    return SamplingParams(
        **{"temperature": TEMPERATURE, **given},
        max_tokens=max_tokens,
        logprobs=logprobs,
        top_k=0 if body.top_k in (None, -1) else body.top_k,  # vLLM's clients turn it off by -1
        seed=None if body.seed is None else _seed(body.seed),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        logit_bias=_biases(body.logit_bias or {}),
    )


def _seed(seed: int) -> int:
    """OpenAI's may be negative: the same 64 bits, without a sign."""
    if not -(2**63) <= seed < 2**64:
        raise InvalidRequest(f"seed must be in [-2^63, 2^64), not {shown(seed)}", field="seed")
    return seed % 2**64


def _biases(biases: Mapping[str, float]) -> dict[int, float]:
    """JSON has no keys but strings."""
    for token in biases:
        if not (token.isascii() and token.isdecimal() and len(token) <= 10):
            raise InvalidRequest(f"logit_bias must be keyed by token ids, not {shown(token)}", field="logit_bias")
    return {int(token): bias for token, bias in biases.items()}


def prompts_of(body: CompletionRequest) -> list[Prompt]:
    """Raises InvalidRequest. Long ones are looked at by loops in C: a body of 4 MiB holds two million token ids."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt.encode()]
    if not isinstance(prompt, list):
        raise _no_prompt(prompt)
    if not prompt:
        raise InvalidRequest("the prompt is empty", field="prompt")
    if type(prompt[0]) is int:
        return [_token_ids(prompt)]
    if len(prompt) > MAX_PROMPTS:
        raise InvalidRequest(f"prompt must hold at most {MAX_PROMPTS} prompts, not {len(prompt)}", field="prompt")
    kind = type(prompt[0])
    if kind not in (str, list) or any(type(each) is not kind for each in prompt):
        raise _no_prompt(prompt)
    return [each.encode() if isinstance(each, str) else _token_ids(each) for each in prompt]


def _no_prompt(value: object) -> InvalidRequest:
    kinds = "a string, a list of strings, a list of token ids or a list of such lists"
    return InvalidRequest(f"prompt must be {kinds}, not {brief(value)}", field="prompt")


def _token_ids(ids: list[int]) -> list[int]:
    """RequestAdmission compares them with the vocabulary; what is no 32-bit number cannot even be told to it."""
    if set(map(type, ids)) - {int}:
        raise _no_prompt(ids)
    if ids and not (min(ids) >= 0 and max(ids) < 2**32):
        wrong = min(ids) if min(ids) < 0 else max(ids)
        raise InvalidRequest(f"prompt must hold token ids in [0, 2^32), not {shown(wrong)}", field="prompt")
    return ids


def _message(body: OpenAIRequest, sampling: SamplingParams, prompt: Prompt) -> generation_pb2.GenerateRequest:
    request = generation_pb2.GenerateRequest(
        model=body.model or "",
        sampling=sampling_to_wire(sampling),
        n=body.n or 1,
        stop=body.stop or (),
        user_tag=body.user or "",
        cache_salt=body.cache_salt or "",
        keep_special_tokens=body.skip_special_tokens is False,
    )
    if isinstance(prompt, bytes):
        request.text = prompt
    else:
        request.token_ids.ids.extend(prompt)
        request.token_ids.SetInParent()
    return request
