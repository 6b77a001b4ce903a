"""From logits to tokens. Randomness is a function of (seed, position) only (law 1).

One uniform number per row and an inverse CDF after filtering: batch, worker and attempt change nothing. Every row's
result depends on that row alone, so rows may be computed together or apart.

All parameters of a step go to the device in one copy, and all that is read of it comes back in one: a GPU's queue stays
full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Self
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tandem.engine.backends.backend import Backend
from tandem.engine.sequence import Sequence
from tandem.types import SamplingParams, Token

_MASK = (1 << 64) - 1
# Below it, divided logits leave float32, and apart from exact ties nothing but the best token has any probability.
LEAST_TEMPERATURE = 1e-30


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for one output position: SplitMix64 (Steele et al., 2014) over seed and position."""
    state = (_mix(seed) + position * 0x9E3779B97F4A7C15) & _MASK
    return (_mix(state) >> 11) / (1 << 53)


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


class Noted:
    def __init__(self, here: NDArray[Any]) -> None:
        self.here = here
        # The same on the device, once the parcel is sent.
        self.there: Tensor


class Parcel:
    """Numbers that are noted one after another, and go to the device together."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._noted: list[Noted] = []

    def note(self, numbers: NDArray[Any]) -> Noted:
        self._noted.append(Noted(numbers))
        return self._noted[-1]

    def send(self) -> None:
        """Once. Nothing is copied if nothing was noted."""
        if self._noted:
            sent = self._backend.send(*(noted.here for noted in self._noted))
            for noted, there in zip(self._noted, sent, strict=True):
                noted.there = there


@dataclass
class _Seen:
    """Which tokens a request has seen, for penalties; kept per sequence, rebuilt from its tokens when missing."""

    in_prompt_V: Tensor
    counts_V: Tensor
    counted: int = 0

    def update(self, new: Tensor) -> None:
        self.counts_V.index_add_(0, new, torch.ones_like(new, dtype=self.counts_V.dtype))
        self.counted += len(new)


@dataclass(frozen=True)
class _Shaping:
    """Tokens of one row that its logits are shaped by, and biases: int64 and float32 [...] on the device."""

    # All of the prompt's, where nobody has seen them yet; output tokens since the last step.
    prompt: Noted
    fresh: Noted
    biased: Noted
    biases: Noted
    banned: Noted


@dataclass(frozen=True)
class _Draws:
    """Rows that are drawn in the same way; int64 [R], and their parameters, float64 [R, 1] each, on the device."""

    rows: Noted
    uniforms: Noted
    temperatures: Noted
    top_k: Noted
    top_p: Noted
    min_p: Noted

    @classmethod
    def of(cls, chosen: list[int], rows: list[Sequence], parcel: Parcel) -> Self:
        drawn = [rows[row] for row in chosen]
        params = [sequence.request.sampling for sequence in drawn]

        def column(values: list[float]) -> Noted:
            return parcel.note(np.array(values, np.float64).reshape(-1, 1))

        return cls(
            rows=parcel.note(np.array(chosen, np.int64)),
            # The router always sends a seed; 0 stands in for engines driven without one.
            uniforms=column([uniform(s.request.sampling.seed or 0, len(s.output_ids)) for s in drawn]),
            temperatures=column([p.temperature for p in params]),
            top_k=column([p.top_k for p in params]),
            top_p=column([p.top_p for p in params]),
            min_p=column([p.min_p for p in params]),
        )


@dataclass
class Sampler:
    eos_token_ids: tuple[int, ...]
    backend: Backend
    _seen: WeakKeyDictionary[Sequence, _Seen] = field(default_factory=WeakKeyDictionary)

    def sample(self, logits_RxV: Tensor, rows: list[Sequence]) -> list[Token]:
        """One token per row. logits: any float dtype, row i belongs to rows[i]."""
        # What is no number would win every comparison.
        raw = logits_RxV.float().nan_to_num(nan=float("-inf"), neginf=float("-inf"))
        # Split by whether a row needs sorting, so that nobody pays for a neighbour.
        random = [row for row, s in enumerate(rows) if s.request.sampling.temperature >= LEAST_TEMPERATURE]
        filtered = [row for row in random if _filters(rows[row].request.sampling)]
        plain = [row for row in random if row not in filtered]
        ways: tuple[tuple[_Pick, list[int]], ...] = ((_pick_plain, plain), (_pick_filtered, filtered))
        parcel = Parcel(self.backend)
        shapings = {row: self._shaping(sequence, parcel) for row, sequence in enumerate(rows) if _is_shaped(sequence)}
        draws = [(pick, _Draws.of(chosen, rows, parcel)) for pick, chosen in ways if chosen]
        parcel.send()
        shaped = self._shape(raw, rows, shapings)
        ids_R = shaped.argmax(dim=-1)
        for pick, drawn in draws:
            ids_R[drawn.rows.there] = pick(shaped[drawn.rows.there], drawn)
        return _read(raw, ids_R, rows)

    def _shaping(self, sequence: Sequence, parcel: Parcel) -> _Shaping:
        params, seen = sequence.request.sampling, self._seen.get(sequence)
        prompt: Iterable[int] = ()
        fresh: Iterable[int] = ()
        if _penalizes(params):
            prompt = sequence.request.prompt_ids if seen is None else ()
            fresh = sequence.output_ids[seen.counted if seen else 0 :]
        bans = len(sequence.output_ids) < params.min_tokens
        banned = stop_ids(params, self.eos_token_ids) if bans else ()

        def ids(tokens: Iterable[int]) -> Noted:
            return parcel.note(np.fromiter(tokens, np.int64))

        biases = parcel.note(np.fromiter(params.logit_bias.values(), np.float32))
        return _Shaping(ids(prompt), ids(fresh), ids(params.logit_bias), biases, ids(banned))

    def _shape(self, raw_RxV: Tensor, rows: list[Sequence], shapings: dict[int, _Shaping]) -> Tensor:
        """Biases, penalties and bans, in this order, as with transformers and vLLM; the input stays as it is for log
        probabilities.
        """
        shaped = raw_RxV
        for row, shaping in shapings.items():
            if shaped is raw_RxV:
                shaped = raw_RxV.clone()
            shaped[row].index_add_(0, shaping.biased.there, shaping.biases.there)
            self._penalize(shaped[row], rows[row], shaping)
            shaped[row].index_fill_(0, shaping.banned.there, float("-inf"))
            shaped[row].nan_to_num_(nan=float("-inf"), neginf=float("-inf"))  # a penalty may leave float32
        return shaped

    def _penalize(self, row_V: Tensor, sequence: Sequence, shaping: _Shaping) -> None:
        params = sequence.request.sampling
        if not _penalizes(params):
            return
        seen = self._seen_by(sequence, row_V, shaping)
        touched = seen.in_prompt_V | (seen.counts_V > 0)
        penalty = params.repetition_penalty
        # As transformers computes it, to the last bit.
        row_V.copy_(torch.where(touched, torch.where(row_V > 0, row_V / penalty, row_V * penalty), row_V))
        row_V -= seen.counts_V * params.frequency_penalty + (seen.counts_V > 0) * params.presence_penalty

    def _seen_by(self, sequence: Sequence, row_V: Tensor, shaping: _Shaping) -> _Seen:
        seen = self._seen.get(sequence)
        if seen is None:
            in_prompt = torch.zeros_like(row_V, dtype=torch.bool).index_fill_(0, shaping.prompt.there, True)
            seen = self._seen[sequence] = _Seen(in_prompt, torch.zeros_like(row_V))
        seen.update(shaping.fresh.there)
        return seen


# [R] int64: one token for each row.
_Pick = Callable[[Tensor, _Draws], Tensor]


def stop_ids(params: SamplingParams, eos_token_ids: tuple[int, ...]) -> set[int]:
    """The tokens that end a request."""
    return {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)}


def _penalizes(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


def _is_shaped(sequence: Sequence) -> bool:
    params = sequence.request.sampling
    return _penalizes(params) or bool(params.logit_bias) or len(sequence.output_ids) < params.min_tokens


def _filters(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def _probabilities(logits_RxV: Tensor, drawn: _Draws) -> Tensor:
    return torch.softmax(logits_RxV.double() / drawn.temperatures.there, dim=-1)


def _pick_plain(logits_RxV: Tensor, drawn: _Draws) -> Tensor:
    return _inverse_cdf(_probabilities(logits_RxV, drawn), drawn)


def _pick_filtered(logits_RxV: Tensor, drawn: _Draws) -> Tensor:
    """top-k, then top-p over what is left, then min-p: transformers' order (vLLM's has min-p first)."""
    probs, order = torch.sort(_probabilities(logits_RxV, drawn), dim=-1, descending=True, stable=True)
    ranks = torch.arange(probs.shape[1], device=probs.device)
    top_k = drawn.top_k.there
    # Filled, not chosen by torch.where: that would copy the 0 to the device.
    probs = probs.masked_fill((ranks >= top_k) & (top_k > 0), 0.0)
    before = probs.cumsum(dim=-1) - probs
    # The best token always stays, whatever rounding does to its neighbours.
    within = (before < drawn.top_p.there * probs.sum(dim=-1, keepdim=True)) | (ranks == 0)
    likely = probs >= drawn.min_p.there * probs[:, :1]
    picked = _inverse_cdf(probs.masked_fill(~(within & likely), 0.0), drawn)
    return order.gather(1, picked.unsqueeze(1)).squeeze(1)


def _inverse_cdf(weights_RxV: Tensor, drawn: _Draws) -> Tensor:
    """The first index whose cumulative weight exceeds u × total, per row; float64."""
    cumulative = weights_RxV.cumsum(dim=-1)
    points = drawn.uniforms.there * cumulative[:, -1:]
    picked = torch.searchsorted(cumulative, points, right=True).squeeze(1)
    # u × total may round up to total: stay on the last token that has weight.
    last = weights_RxV.shape[1] - 1 - (weights_RxV > 0).flip(1).int().argmax(dim=1)
    return torch.minimum(picked, last)


def _read(raw_RxV: Tensor, ids_R: Tensor, rows: list[Sequence]) -> list[Token]:
    """The tokens, with log probabilities for those who want them: of the model's own distribution, before penalties,
    temperature and filters."""
    wanted = [(row, count) for row, s in enumerate(rows) if (count := s.request.sampling.logprobs) is not None]
    if not wanted:
        return [Token(token) for token in ids_R.cpu().tolist()]
    parts = [ids_R.double()]
    for row, count in wanted:
        logprobs_V = torch.log_softmax(raw_RxV[row], dim=-1)
        values, ids = torch.topk(logprobs_V, min(count, logprobs_V.numel()))
        parts += [logprobs_V.gather(0, ids_R[row : row + 1]).double(), ids.double(), values.double()]
    # Float64 holds ids and float32 exactly.
    numbers = iter(torch.cat(parts).cpu().tolist())
    tokens = [Token(int(next(numbers))) for _ in rows]
    for row, count in wanted:
        most = min(count, raw_RxV.shape[1])
        logprob, likely = next(numbers), [int(next(numbers)) for _ in range(most)]
        tokens[row] = Token(tokens[row].id, logprob, tuple((token, next(numbers)) for token in likely))
    return tokens
