"""From logits to tokens. Randomness is a function of (seed, position) only (law 1).

One uniform number per row and an inverse CDF after filtering: batch, worker and attempt change nothing. Every row's
result depends on that row alone, so rows may be computed together or apart.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tandem.engine.sequence import Sequence
from tandem.types import SamplingParams, Token

_MASK = (1 << 64) - 1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for one output position: SplitMix64 (Steele et al., 2014) over seed and position."""
    state = (_mix(seed) + position * 0x9E3779B97F4A7C15) & _MASK
    return (_mix(state) >> 11) / (1 << 53)


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


@dataclass
class _Seen:
    """Which tokens a request has seen, for penalties; kept per sequence, rebuilt from its tokens when missing."""

    in_prompt_V: Tensor
    counts_V: Tensor
    counted: int = 0

    def update(self, output_ids: list[int]) -> None:
        new = torch.tensor(output_ids[self.counted :], dtype=torch.long, device=self.counts_V.device)
        self.counts_V.index_add_(0, new, torch.ones_like(new, dtype=self.counts_V.dtype))
        self.counted = len(output_ids)


@dataclass
class Sampler:
    eos_token_ids: tuple[int, ...]
    _seen: WeakKeyDictionary[Sequence, _Seen] = field(default_factory=WeakKeyDictionary)

    def sample(self, logits_RxV: Tensor, rows: list[Sequence]) -> list[Token]:
        """One token per row. logits: any float dtype, row i belongs to rows[i]."""
        raw = logits_RxV.float()
        shaped = self._shape(raw, rows)
        ids = shaped.argmax(dim=-1).tolist()
        # Split by whether a row needs sorting, so that nobody pays for a neighbour.
        random = [row for row, sequence in enumerate(rows) if sequence.request.sampling.temperature > 0]
        filtered = [row for row in random if _filters(rows[row].request.sampling)]
        plain = [row for row in random if row not in filtered]
        for pick, chosen in ((_pick_plain, plain), (_pick_filtered, filtered)):
            if chosen:
                picked = pick(shaped[chosen], [rows[row] for row in chosen])
                for row, token in zip(chosen, picked, strict=True):
                    ids[row] = token
        return self._with_logprobs(raw, ids, rows)

    def _shape(self, raw_RxV: Tensor, rows: list[Sequence]) -> Tensor:
        """Penalties, biases and bans; the input stays as it is for log probabilities."""
        shaped = raw_RxV
        for row, sequence in enumerate(rows):
            if not _is_shaped(sequence):
                continue
            if shaped is raw_RxV:
                shaped = raw_RxV.clone()
            self._penalize(shaped[row], sequence)
            self._ban_and_bias(shaped[row], sequence)
        return shaped

    def _penalize(self, row_V: Tensor, sequence: Sequence) -> None:
        params = sequence.request.sampling
        if not _penalizes(params):
            return
        seen = self._seen_by(sequence, row_V)
        touched = seen.in_prompt_V | (seen.counts_V > 0)
        penalty = params.repetition_penalty
        # As transformers computes it, to the last bit.
        row_V.copy_(torch.where(touched, torch.where(row_V > 0, row_V / penalty, row_V * penalty), row_V))
        row_V -= seen.counts_V * params.frequency_penalty + (seen.counts_V > 0) * params.presence_penalty

    def _seen_by(self, sequence: Sequence, row_V: Tensor) -> _Seen:
        seen = self._seen.get(sequence)
        if seen is None:
            in_prompt = torch.zeros_like(row_V, dtype=torch.bool)
            in_prompt[torch.tensor(sequence.request.prompt_ids, device=row_V.device)] = True
            seen = self._seen[sequence] = _Seen(in_prompt, torch.zeros_like(row_V))
        seen.update(sequence.output_ids)
        return seen

    def _ban_and_bias(self, row_V: Tensor, sequence: Sequence) -> None:
        params = sequence.request.sampling
        for token, bias in params.logit_bias.items():
            row_V[token] += bias
        if len(sequence.output_ids) < params.min_tokens:
            row_V[list(stop_ids(params, self.eos_token_ids))] = float("-inf")

    def _with_logprobs(self, raw_RxV: Tensor, ids: list[int], rows: list[Sequence]) -> list[Token]:
        tokens = [Token(token) for token in ids]
        for row, sequence in enumerate(rows):
            count = sequence.request.sampling.logprobs
            if count is not None:
                tokens[row] = _logprobs_of(raw_RxV[row], ids[row], count)
        return tokens


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


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device).unsqueeze(1)


def _uniforms(rows: list[Sequence], like: Tensor) -> Tensor:
    # The router always sends a seed; 0 stands in for engines driven without one.
    return _column([uniform(s.request.sampling.seed or 0, len(s.output_ids)) for s in rows], like)


def _probabilities(logits_RxV: Tensor, rows: list[Sequence]) -> Tensor:
    temperatures = _column([s.request.sampling.temperature for s in rows], logits_RxV)
    return torch.softmax(logits_RxV.double() / temperatures, dim=-1)


def _pick_plain(logits_RxV: Tensor, rows: list[Sequence]) -> list[int]:
    return _inverse_cdf(_probabilities(logits_RxV, rows), rows).tolist()


def _pick_filtered(logits_RxV: Tensor, rows: list[Sequence]) -> list[int]:
    """top-k, then top-p over what is left, then min-p, as transformers' warpers do in that order."""
    params = [s.request.sampling for s in rows]
    probs, order = torch.sort(_probabilities(logits_RxV, rows), dim=-1, descending=True, stable=True)
    ranks = torch.arange(probs.shape[1], device=probs.device)
    top_k = _column([p.top_k or probs.shape[1] for p in params], probs)
    probs = torch.where(ranks < top_k, probs, 0.0)
    before = probs.cumsum(dim=-1) - probs
    # The best token always stays, whatever rounding does to its neighbours.
    within = (before < _column([p.top_p for p in params], probs) * probs.sum(dim=-1, keepdim=True)) | (ranks == 0)
    likely = probs >= _column([p.min_p for p in params], probs) * probs[:, :1]
    picked = _inverse_cdf(torch.where(within & likely, probs, 0.0), rows)
    return order.gather(1, picked.unsqueeze(1)).squeeze(1).tolist()


def _inverse_cdf(weights_RxV: Tensor, rows: list[Sequence]) -> Tensor:
    """The first index whose cumulative weight exceeds u × total, per row; float64."""
    cumulative = weights_RxV.cumsum(dim=-1)
    points = _uniforms(rows, weights_RxV) * cumulative[:, -1:]
    picked = torch.searchsorted(cumulative, points, right=True).squeeze(1)
    # u × total may round up to total: stay on the last token that has weight.
    last = weights_RxV.shape[1] - 1 - (weights_RxV > 0).flip(1).int().argmax(dim=1)
    return torch.minimum(picked, last)


def _logprobs_of(row_V: Tensor, token: int, count: int) -> Token:
    """Of the model's own distribution, before penalties, temperature and filters."""
    logprobs = torch.log_softmax(row_V, dim=-1)
    values, ids = torch.topk(logprobs, min(count, row_V.numel())) if count else (logprobs[:0], logprobs[:0].long())
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Token(token, float(logprobs[token]), top)
