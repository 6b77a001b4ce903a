"""Validates a request once; what lies behind may trust it."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from router.pool.prefix_index import name_blocks
from router.tokenizer import Tokenizer
from tandem.config import RouterConfig
from tandem.errors import RETRY_AFTER_MS, InvalidRequest, ModelNotFound, Overloaded
from tandem.types import (
    MAX_CHOICES,
    MAX_EMBED_INPUTS,
    MAX_STOP_STRING_CHARS,
    MAX_STOP_STRINGS,
    EmbedParams,
    EngineRequest,
    ModelInfo,
    Pooling,
    SamplingParams,
)
from tandem.v1 import generation_pb2
from tandem.wire import embed_params_from_wire, embed_response_bytes, sampling_from_wire

MAX_LABEL_CHARS = 256


@dataclass(frozen=True)
class Admitted:
    """A valid request: tokenized once, seeded, with the router's own id."""

    request_id: str
    model: ModelInfo
    prompt_ids: tuple[int, ...]
    # Names of the prompt's full blocks, to look up in workers' prefix caches.
    block_names: tuple[bytes, ...]
    # With a seed.
    sampling: SamplingParams
    n: int
    stop: tuple[str, ...]
    cache_salt: str
    keep_special_tokens: bool
    user_tag: str

    def choice(self, index: int, attempt: int = 0) -> EngineRequest:
        """What the workers get for one choice."""
        return EngineRequest(
            request_id=self.request_id if self.n == 1 else f"{self.request_id}-{index}",
            prompt_ids=self.prompt_ids,
            sampling=replace(self.sampling, seed=choice_seed(self.sampling.seed or 0, index)),
            attempt=attempt,
            cache_salt=self.cache_salt,
        )


@dataclass(frozen=True)
class EmbedPrompt:
    prompt_ids: tuple[int, ...]
    # Names of the prompt's full blocks; none where the prefix cache is of no use.
    block_names: tuple[bytes, ...]


@dataclass(frozen=True)
class AdmittedEmbed:
    """A valid Embed request: tokenized once, with the router's own id."""

    request_id: str
    prompts: tuple[EmbedPrompt, ...]
    params: EmbedParams
    cache_salt: str
    user_tag: str

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt.prompt_ids) for prompt in self.prompts)


def answers_of(request: generation_pb2.GenerateRequest) -> int:
    """How many the request may have; admission refuses those that want more."""
    return min(max(1, request.n), MAX_CHOICES)


def choice_seed(seed: int, index: int) -> int:
    """The request's own seed for choice 0; for the others one that depends on nothing but (seed, index)."""
    if index == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest())


def deadline_s(remaining_s: float | None, config: RouterConfig) -> float:
    """Seconds that a request may take (law 4). remaining_s: what its caller set, if anything."""
    return min(config.default_deadline_s if remaining_s is None else remaining_s, config.max_deadline_s)


class ConcurrencyLimit:
    """How many answers are under way at once: of a request all n, for those are what workers and memory feel."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._live = 0

    def check(self, answers: int, field: str = "n", asked: str = "") -> None:
        """Raises InvalidRequest for what could never enter. field: of the request, that asks for so many; asked: the
        same in words, where it is not alone.
        """
        words = f"{asked or field} asks for {answers} answers at once; the most this router takes is {self._limit}"
        _require(answers <= self._limit, field, f"{words} (router.max_live_requests)")

    @contextmanager
    def enter(self, answers: int = 1) -> Iterator[None]:
        """Raises Overloaded when they do not fit now, InvalidRequest when they never will."""
        self.check(answers)
        if self._live + answers > self._limit:
            words = f"{self._live} answers are under way, and {answers} more would be too many"
            raise Overloaded(
                f"{words}: the most this router takes is {self._limit} (router.max_live_requests)",
                retry_after_ms=RETRY_AFTER_MS,
            )
        self._live += answers
        try:
            yield
        finally:
            self._live -= answers


class RequestAdmission:
    """Turns what a client sent into a valid, tokenized request, or says what is wrong with it."""

    def __init__(self, tokenizer: Tokenizer | None, served: Callable[[], ModelInfo], max_message_bytes: int) -> None:
        """max_message_bytes: of an answer."""
        self.tokenizer = tokenizer
        self._served = served
        self._max_message_bytes = max_message_bytes

    async def admit(self, request: generation_pb2.GenerateRequest, request_id: str) -> Admitted:
        """request_id: no other request has it. Raises InvalidRequest naming the field and its limit, ModelNotFound, or
        Unavailable.
        """
        _check_labels(request)
        n = request.n or 1
        _require(n <= MAX_CHOICES, "n", f"n must be in [1, {MAX_CHOICES}], not {n}")
        stop = self._stop_strings(request)
        sampling = sampling_from_wire(request.sampling) if request.HasField("sampling") else SamplingParams()
        model = self._model(request.model)
        _check_token_maps(sampling, model)
        prompt_ids = await self._prompt_ids(request, model)
        _check_length(len(prompt_ids), sampling.max_tokens, model.max_model_len)
        return Admitted(
            request_id=request_id,
            model=model,
            prompt_ids=prompt_ids,
            block_names=await name_blocks(prompt_ids, model.fingerprint.block_size, request.cache_salt),
            sampling=sampling if sampling.seed is not None else replace(sampling, seed=secrets.randbits(64)),
            n=n,
            stop=stop,
            cache_salt=request.cache_salt,
            keep_special_tokens=request.keep_special_tokens,
            user_tag=request.user_tag,
        )

    async def admit_embed(self, request: generation_pb2.EmbedRequest, request_id: str) -> AdmittedEmbed:
        """Raises as `admit` does; what is wrong with one input names that input."""
        _check_labels(request)
        count = len(request.inputs)
        _require(1 <= count <= MAX_EMBED_INPUTS, "inputs", f"inputs must hold 1 to {MAX_EMBED_INPUTS}, not {count}")
        params = embed_params_from_wire(request.pooling, not request.HasField("normalize") or request.normalize)
        model = self._model(request.model)
        _check_vectors(count, model.hidden_size, self._max_message_bytes)
        prompts = []
        for index, each in enumerate(request.inputs):
            try:
                prompts.append(await self._embed_prompt(each, params, model, request.cache_salt))
            except InvalidRequest as error:
                raise InvalidRequest(f"inputs[{index}]: {error.message}", field="inputs") from None
        return AdmittedEmbed(request_id, tuple(prompts), params, request.cache_salt, request.user_tag)

    async def _embed_prompt(
        self, message: generation_pb2.EmbedInput, params: EmbedParams, model: ModelInfo, salt: str
    ) -> EmbedPrompt:
        ids = await self._prompt_ids(message, model)
        limit = model.max_model_len
        _require(len(ids) <= limit, "prompt", f"the prompt has {len(ids)} tokens; the model's limit is {limit}")
        if params.pooling is Pooling.MEAN:
            return EmbedPrompt(ids, ())
        return EmbedPrompt(ids, await name_blocks(ids, model.fingerprint.block_size, salt))

    def _model(self, name: str) -> ModelInfo:
        model = self._served()
        if name and name != model.name:
            raise ModelNotFound(f"model {name!r} is not served; served: {model.name}", field="model")
        return model

    def _stop_strings(self, request: generation_pb2.GenerateRequest) -> tuple[str, ...]:
        stop = tuple(request.stop)
        _require(len(stop) <= MAX_STOP_STRINGS, "stop", f"stop must hold at most {MAX_STOP_STRINGS} strings")
        for string in stop:
            _require(bool(string), "stop", "a stop string must not be empty")
            limit = f"a stop string must have at most {MAX_STOP_STRING_CHARS} characters, not {len(string)}"
            _require(len(string) <= MAX_STOP_STRING_CHARS, "stop", limit)
        _require(not stop or self.tokenizer is not None, "stop", "stop strings need a tokenizer; the model has none")
        return stop

    async def _prompt_ids(
        self, request: generation_pb2.GenerateRequest | generation_pb2.EmbedInput, model: ModelInfo
    ) -> tuple[int, ...]:
        match request.WhichOneof("prompt"):
            case "text":
                ids = await self._encode(request.text, model.max_model_len)
            case "token_ids":
                ids = tuple(request.token_ids.ids)
            case _:
                raise InvalidRequest("the request has no prompt", field="prompt")
        _require(bool(ids), "prompt", "the prompt is empty")
        _require(max(ids) < model.vocab_size, "prompt", f"token ids must be below {model.vocab_size}, not {max(ids)}")
        return ids

    async def _encode(self, data: bytes, limit: int) -> tuple[int, ...]:
        if self.tokenizer is None:
            raise InvalidRequest("the model has no tokenizer: the prompt must be token ids", field="prompt")
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"the prompt is not valid UTF-8 at byte {error.start}", field="prompt") from None
        _require(bool(text), "prompt", "the prompt is empty")
        return await self.tokenizer.encode(text, limit)


def _require(ok: bool, field: str, message: str) -> None:
    if not ok:
        raise InvalidRequest(message, field=field)


def _check_labels(request: generation_pb2.GenerateRequest | generation_pb2.EmbedRequest) -> None:
    for name in ("model", "user_tag", "cache_salt"):
        length = len(getattr(request, name))
        limit = f"{name} must have at most {MAX_LABEL_CHARS} characters, not {length}"
        _require(length <= MAX_LABEL_CHARS, name, limit)


def _check_token_maps(sampling: SamplingParams, model: ModelInfo) -> None:
    vocab_size = model.vocab_size
    for name, ids in (("logit_bias", sampling.logit_bias), ("stop_token_ids", sampling.stop_token_ids)):
        largest = max(ids, default=0)
        _require(largest < vocab_size, name, f"{name} must hold token ids below {vocab_size}, not {largest}")
    ends = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else model.eos_token_ids)}
    words = f"min_tokens must be 0 where stop_token_ids hold all {vocab_size} tokens: none would be left"
    _require(not sampling.min_tokens or len(ends) < vocab_size, "min_tokens", words)


def _check_vectors(count: int, width: int, limit: int) -> None:
    """Before anything is computed: the answer to an Embed call is one message."""
    size = embed_response_bytes(count, width)
    words = f"{count} vectors of {width} numbers take {size} bytes; router.max_message_bytes is {limit}"
    _require(size <= limit, "inputs", f"{words}: embed fewer inputs at once")


def _check_length(prompt_tokens: int, max_tokens: int, limit: int) -> None:
    _require(prompt_tokens < limit, "prompt", f"the prompt has {prompt_tokens} tokens; the model's limit is {limit}")
    _require(
        prompt_tokens + max_tokens <= limit,
        "max_tokens",
        f"prompt ({prompt_tokens}) and max_tokens ({max_tokens}) together exceed the model's limit of {limit} tokens",
    )
