"""Values that every room shares. No torch, no gRPC: the SDK imports this."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from numbers import Integral, Real
from typing import Any, NamedTuple

from tandem.errors import InvalidRequest
from tandem.timeline import Timeline

MAX_LOGPROBS = 20
MAX_LOGIT_BIASES = 1024
MAX_STOP_TOKEN_IDS = 128
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 256
MAX_CHOICES = 32
MAX_EMBED_INPUTS = 64
# Largest count of tokens: what the engine's numbers hold.
MAX_INT32 = 2**31 - 1


class Role(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"


class Pooling(StrEnum):
    """Which final hidden states of a prompt make its embedding."""

    LAST = "last"
    MEAN = "mean"


class FinishReason(StrEnum):
    """The one terminal event of every accepted request (law 2)."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


def shown(value: object) -> str:
    """A value in an error message: as Python writes it, and not too long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _require(ok: bool, field_name: str, limit: str, value: object) -> None:
    if not ok:
        raise InvalidRequest(f"{field_name} must be {limit}, not {shown(value)}", field=field_name)


def _require_from(field_name: str, least: int, value: int) -> None:
    """The upper limit is said to those only who broke it: no model comes near it."""
    _require(value >= least, field_name, f"{least} or more", value)
    _require(value <= MAX_INT32, field_name, f"at most {MAX_INT32}", value)


def _is_whole(value: Any) -> bool:
    """numpy's integers are too."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_token_id(value: Any) -> bool:
    return _is_whole(value) and 0 <= value < 2**32


# Fields whose limits are both allowed. NaN is in no range.
_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, 100),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 100),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
}


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. The default is greedy. Raises InvalidRequest, naming the field and its limit."""

    # Tokens to generate at most.
    max_tokens: int = 128
    # Stop conditions are ignored for this many tokens.
    min_tokens: int = 0
    # 0 is greedy, and so is what is below 1e-30; otherwise logits are divided by it.
    temperature: float = 0.0
    # Keep the k most probable tokens; 0 keeps all.
    top_k: int = 0
    # Keep the smallest set of tokens whose probability reaches this; 1 keeps all.
    top_p: float = 1.0
    # Keep, of what top_k and top_p leave, tokens at least this share as probable as the best one; 0 keeps all.
    min_p: float = 0.0
    # Divides positive (multiplies negative) logits of tokens seen in prompt or output; 1 is off.
    repetition_penalty: float = 1.0
    # Subtracted once from the logits of tokens seen in the output.
    presence_penalty: float = 0.0
    # Subtracted from the logits of tokens seen in the output, once per occurrence.
    frequency_penalty: float = 0.0
    # Added to the logits of these token ids, before the penalties.
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    # Randomness is a function of (seed, position) only; None lets the router draw a seed.
    seed: int | None = None
    # Generation ends after any of these; the token is part of the output, its text is not.
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    # None: no log probabilities; k: of the chosen token and of the k most probable ones.
    logprobs: int | None = None

    def __post_init__(self) -> None:
        self._check_types()
        _require_from("max_tokens", 1, self.max_tokens)
        min_tokens_limit = f"in [0, max_tokens={self.max_tokens}]"
        _require(0 <= self.min_tokens <= self.max_tokens, "min_tokens", min_tokens_limit, self.min_tokens)
        _require_from("top_k", 0, self.top_k)
        _require(0 < self.top_p <= 1, "top_p", "in (0, 1]", self.top_p)
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            _require(low <= value <= high, name, f"in [{low}, {high}]", value)
        _require(self.seed is None or 0 <= self.seed < 2**64, "seed", "in [0, 2^64)", self.seed)
        in_range = self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS
        _require(in_range, "logprobs", f"in [0, {MAX_LOGPROBS}]", self.logprobs)
        self._check_token_maps()

    def _check_types(self) -> None:
        for name in ("max_tokens", "min_tokens", "top_k"):
            _require(_is_whole(getattr(self, name)), name, "a whole number", getattr(self, name))
        for name in ("top_p", *_RANGES):
            _require(_is_number(getattr(self, name)), name, "a number", getattr(self, name))
        for name in ("seed", "logprobs"):
            value = getattr(self, name)
            _require(value is None or _is_whole(value), name, "a whole number or None", value)
        _require(isinstance(self.ignore_eos, bool), "ignore_eos", "True or False", self.ignore_eos)
        mapped = isinstance(self.logit_bias, Mapping)
        _require(mapped, "logit_bias", "a mapping of token ids to numbers", self.logit_bias)
        listed = isinstance(self.stop_token_ids, Collection) and not isinstance(self.stop_token_ids, str | bytes)
        _require(listed, "stop_token_ids", "a list of token ids", self.stop_token_ids)

    def _check_token_maps(self) -> None:
        biases, stops = len(self.logit_bias), len(self.stop_token_ids)
        _require(biases <= MAX_LOGIT_BIASES, "logit_bias", f"at most {MAX_LOGIT_BIASES} entries", biases)
        _require(stops <= MAX_STOP_TOKEN_IDS, "stop_token_ids", f"at most {MAX_STOP_TOKEN_IDS} ids", stops)
        for token, bias in self.logit_bias.items():
            _require(_is_token_id(token), "logit_bias", "keyed by token ids in [0, 2^32)", token)
            _require(_is_number(bias) and -100 <= bias <= 100, "logit_bias", "in [-100, 100]", bias)
        for token in self.stop_token_ids:
            _require(_is_token_id(token), "stop_token_ids", "token ids in [0, 2^32)", token)


@dataclass(frozen=True)
class EmbedParams:
    """How a prompt's final hidden states (after the final norm) become one vector."""

    pooling: Pooling = Pooling.LAST
    # Divided by its Euclidean length.
    normalize: bool = True


@dataclass(frozen=True)
class EngineRequest:
    """A request as workers see it: tokens in, one answer out."""

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    # A retry has a new attempt; what belongs to an older one is ignored everywhere.
    attempt: int = 0
    # Only requests of the same salt share prefix-cache blocks.
    cache_salt: str = ""


class Token(NamedTuple):
    """One generated token. A tuple: the router makes one of each that passes, a dataclass takes thrice as long."""

    id: int
    logprob: float | None = None
    # (token id, log probability), best first.
    top_logprobs: tuple[tuple[int, float], ...] = ()


# What the numbers of a KV pool may be, and their bytes.
KV_DTYPES: Mapping[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Fingerprint:
    """What must be equal on two workers that exchange KV."""

    config_hash: str
    weights_hash: str
    dtype: str
    block_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    layout: int

    @property
    def token_bytes(self) -> int:
        """K and V of one token, all layers."""
        itemsize = KV_DTYPES.get(self.dtype, 2)
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * itemsize

    def difference(self, other: Fingerprint) -> str | None:
        """'block_size 16 against 32' for the first field that differs, else None."""
        for name in self.__dataclass_fields__:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name} {_short(mine)} against {_short(theirs)}"
        return None


def _short(value: object) -> str:
    return str(value)[:12]


@dataclass(frozen=True)
class ModelInfo:
    name: str
    vocab_size: int
    # Prompt and output together, tokens.
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    fingerprint: Fingerprint
    # Numbers in a hidden state, so in an embedding.
    hidden_size: int


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int
    output_tokens: int
    cached_prompt_tokens: int = 0


@dataclass(frozen=True)
class RequestReport:
    """Where the time and the bytes of one choice went."""

    timeline: Timeline
    kv_bytes: int = 0
    kv_frames: int = 0
    kv_reused_tokens: int = 0
    # In which the sender worked on the transfer; of that, what lay before the first token, hidden under compute.
    kv_transfer_ms: float = 0.0
    kv_hidden_ms: float = 0.0
    transport: str = ""
    prefill_worker: str = ""
    decode_worker: str = ""


# Events that the SDK yields, in order: Accepted, then Delta and ChoiceFinished for each choice, then Completed.


@dataclass(frozen=True)
class Accepted:
    request_id: str
    prompt_tokens: int


@dataclass(frozen=True)
class Delta:
    """New tokens of one choice. Text is empty while a UTF-8 character or a possible stop string is incomplete."""

    choice: int
    tokens: tuple[Token, ...]
    text: str
    # The choice's last Delta has them; ChoiceFinished, which follows once the workers are released, says them again.
    reason: FinishReason | None = None
    stop: str | None = None


@dataclass(frozen=True)
class ChoiceFinished:
    """A choice ended by stop or length; one that fails raises its error instead, for the whole request."""

    choice: int
    reason: FinishReason
    output_tokens: int
    report: RequestReport
    # The stop string that ended it, if one did.
    stop: str | None = None


@dataclass(frozen=True)
class Completed:
    usage: Usage


Event = Accepted | Delta | ChoiceFinished | Completed
