"""What both clients do before a call: keyword arguments in, a checked GenerateRequest out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypedDict

from tandem import wire
from tandem.errors import InvalidRequest
from tandem.types import MAX_CHOICES, MAX_EMBED_INPUTS, EmbedParams, Pooling, SamplingParams, shown
from tandem.v1 import generation_pb2

Prompt = str | Sequence[int]

DEFAULT_ADDRESS = "127.0.0.1:8700"
# Deadline of calls that carry no prompt.
ADMIN_TIMEOUT_S = 10.0
# A client bounds messages by what any router may be configured to accept; the router's own limit is what decides.
MAX_MESSAGE_BYTES = 1 << 28


class SamplingFields(TypedDict, total=False):
    """The fields of types.SamplingParams, as keyword arguments."""

    max_tokens: int
    min_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int | None
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    logprobs: int | None


@dataclass(frozen=True)
class RequestOptions:
    """What is asked beside the prompt and the sampling."""

    n: int = 1
    stop: str | Sequence[str] = ()
    model: str = ""
    cache_salt: str = ""
    user_tag: str = ""
    keep_special_tokens: bool = False


def build_request(
    prompt: Prompt, sampling: SamplingParams | None, fields: SamplingFields, options: RequestOptions
) -> generation_pb2.GenerateRequest:
    """Raises InvalidRequest, naming the field, for what no server could accept; the rest is the server's to judge."""
    request = generation_pb2.GenerateRequest(
        model=_text("model", options.model),
        sampling=wire.sampling_to_wire(merge_sampling(sampling, fields)),
        n=_choices(options.n),
        stop=_stops(options.stop),
        user_tag=_text("user_tag", options.user_tag),
        cache_salt=_text("cache_salt", options.cache_salt),
        keep_special_tokens=_flag("keep_special_tokens", options.keep_special_tokens),
    )
    _set_prompt(request, prompt)
    return request


@dataclass(frozen=True)
class EmbedOptions:
    """What is asked beside the inputs."""

    pooling: Pooling | Literal["last", "mean"] = Pooling.LAST
    normalize: bool = True
    model: str = ""
    cache_salt: str = ""
    user_tag: str = ""


def build_embed_request(inputs: str | Sequence[Prompt], options: EmbedOptions) -> generation_pb2.EmbedRequest:
    """Raises InvalidRequest, naming the field, for what no server could accept; the rest is the server's to judge."""
    try:
        params = EmbedParams(Pooling(options.pooling), bool(options.normalize))
    except ValueError:
        raise InvalidRequest(f"pooling must be last or mean, not {options.pooling!r}", field="pooling") from None
    pooling, normalize = wire.embed_params_to_wire(params)
    request = generation_pb2.EmbedRequest(
        pooling=pooling,
        normalize=normalize,
        model=_text("model", options.model),
        user_tag=_text("user_tag", options.user_tag),
        cache_salt=_text("cache_salt", options.cache_salt),
    )
    each_input = [inputs] if isinstance(inputs, str) else _listed(inputs)
    if not 1 <= len(each_input) <= MAX_EMBED_INPUTS:
        raise InvalidRequest(f"inputs must hold 1 to {MAX_EMBED_INPUTS}, not {len(each_input)}", field="inputs")
    for prompt in each_input:
        _set_prompt(request.inputs.add(), prompt)
    return request


def _listed(inputs: Sequence[Prompt]) -> list[Prompt]:
    if isinstance(inputs, Sequence) and not isinstance(inputs, bytes | bytearray):
        return list(inputs)
    raise InvalidRequest(f"inputs must be a list of prompts, not {type(inputs).__name__}", field="inputs")


def _set_prompt(message: generation_pb2.GenerateRequest | generation_pb2.EmbedInput, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        message.text = _text("prompt", prompt).encode()
    else:
        message.token_ids.CopyFrom(_token_ids(prompt))


# A year: gRPC's own arithmetic overflows somewhere above, and then the deadline has passed at once.
LONGEST_TIMEOUT_S = 365 * 24 * 3600.0


def check_timeout(timeout_s: float | None) -> float | None:
    """Raises InvalidRequest unless it is a positive, finite number of seconds, or None."""
    try:
        if timeout_s is None:
            return None
        if timeout_s > 0 and math.isfinite(timeout_s):
            return min(timeout_s, LONGEST_TIMEOUT_S)
    except (TypeError, OverflowError):
        pass  # not a number: the same answer as for a bad one
    raise InvalidRequest(f"timeout_s must be a number of seconds above 0, not {shown(timeout_s)}", field="timeout_s")


def merge_sampling(sampling: SamplingParams | None, fields: SamplingFields) -> SamplingParams:
    """Keyword fields on top of `sampling`. An unknown field is a TypeError, as for any function."""
    if not isinstance(sampling, SamplingParams | None):
        words = f"sampling must be a tandem.SamplingParams, not {type(sampling).__name__}"
        raise InvalidRequest(f"{words}; its fields may be given as keyword arguments too", field="sampling")
    unknown = sorted(fields.keys() - SamplingParams.__dataclass_fields__.keys())
    if unknown:
        raise TypeError(f"generate() got an unexpected keyword argument {unknown[0]!r}")
    return replace(sampling or SamplingParams(), **fields)


def _choices(n: int) -> int:
    if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= MAX_CHOICES:
        raise InvalidRequest(f"n must be a whole number in [1, {MAX_CHOICES}], not {shown(n)}", field="n")
    return n


def _flag(field: str, value: bool) -> bool:
    if not isinstance(value, bool):
        raise InvalidRequest(f"{field} must be True or False, not {shown(value)}", field=field)
    return value


def _stops(stop: str | Sequence[str]) -> list[str]:
    if isinstance(stop, bytes) or not isinstance(stop, Iterable):
        raise InvalidRequest(f"stop must be a str or a list of them, not {shown(stop)}", field="stop")
    return [_text("stop", each) for each in ([stop] if isinstance(stop, str) else stop)]


def _text(field: str, value: str) -> str:
    """The value, if it is a str that UTF-8 can carry: a lone surrogate cannot be encoded."""
    if not isinstance(value, str):
        raise InvalidRequest(f"{field} must be a str, not {shown(value)}", field=field)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{field} must be text that UTF-8 can carry; character {error.start} is a lone surrogate", field=field
        ) from None
    return value


def _token_ids(prompt: Sequence[int]) -> generation_pb2.TokenIds:
    if isinstance(prompt, bytes | bytearray) or not isinstance(prompt, Iterable):
        raise InvalidRequest(f"prompt must be a str or a list of token ids, not {shown(prompt)}", field="prompt")
    ids = list(prompt)
    try:
        return generation_pb2.TokenIds(ids=ids)
    except (TypeError, ValueError, OverflowError):
        # Looked for only when there is one: prompts are long.
        place = next((place for place, id_ in enumerate(ids) if not _is_token_id(id_)), 0)
        words = f"prompt[{place}] must be a token id, a whole number in [0, 2^32), not {shown(ids[place])}"
        raise InvalidRequest(words, field="prompt") from None


def _is_token_id(value: object) -> bool:
    try:
        generation_pb2.TokenIds(ids=[value])  # type: ignore[list-item]
    except (TypeError, ValueError, OverflowError):
        return False
    return True
