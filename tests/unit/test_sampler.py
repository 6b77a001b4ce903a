"""Sampling: right distributions, right filters, and a result that depends on the row alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tandem.engine.backends.backend import backend_for
from tandem.engine.sampler import Parcel, Sampler, uniform
from tandem.engine.sequence import Sequence
from tandem.types import EngineRequest, SamplingParams

VOCAB = 50
EOS = 2
MOST = 100
CPU = backend_for("cpu")


def _row(params: SamplingParams, outputs: tuple[int, ...] = (), prompt: tuple[int, ...] = (5, 6)) -> Sequence:
    request = EngineRequest("r", prompt, params if params.max_tokens == MOST else replace(params, max_tokens=MOST))
    return Sequence(request, lambda event: None, decode_here=True, output_ids=list(outputs))


def _logits(rows: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def _sample(logits: Tensor, *rows: Sequence) -> list[int]:
    return [token.id for token in Sampler((EOS,), CPU).sample(logits, list(rows))]


def _draws(logits: Tensor, params: SamplingParams, count: int) -> Tensor:
    """Relative frequencies of tokens over many seeds."""
    rows = [_row(replace(params, seed=seed, max_tokens=MOST)) for seed in range(count)]
    picked = torch.tensor(_sample(logits.expand(count, -1), *rows))
    return torch.bincount(picked, minlength=VOCAB) / count


def test_uniform_is_spread_evenly_over_seeds_and_positions() -> None:
    draws = torch.tensor([uniform(seed, position) for seed in range(200) for position in range(50)])
    assert 0 <= float(draws.min()) <= float(draws.max()) < 1
    counts = torch.histc(draws, bins=20, min=0, max=1)
    assert float((counts - 500).abs().max()) < 120  # five standard deviations
    assert uniform(1, 0) != uniform(0, 1)


def test_greedy_takes_the_best() -> None:
    logits = _logits(3)
    assert _sample(logits, *[_row(SamplingParams())] * 3) == logits.argmax(dim=-1).tolist()


def test_frequencies_follow_the_softmax() -> None:
    logits = _logits()
    wanted = torch.softmax(logits[0] / 0.7, dim=-1)
    assert float((_draws(logits, SamplingParams(temperature=0.7), 20000) - wanted).abs().max()) < 0.015


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0, top_k=3),
        SamplingParams(temperature=1.0, top_p=0.6),
        SamplingParams(temperature=1.0, min_p=0.3),
        SamplingParams(temperature=1.5, top_k=8, top_p=0.8, min_p=0.1),
    ],
)
def test_filters_agree_with_transformers(params: SamplingParams) -> None:
    from transformers.generation.logits_process import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = _logits()
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))
    wanted = torch.softmax(warpers(torch.zeros(1, 1, dtype=torch.long), logits.clone()), dim=-1)[0]
    got = _draws(logits, params, 20000)
    assert set(got.nonzero().flatten().tolist()) == set(wanted.nonzero().flatten().tolist())
    assert float((got - wanted).abs().max()) < 0.02


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    logits = _logits(16)
    kinds = [
        SamplingParams(),
        SamplingParams(temperature=1.0, seed=7),
        SamplingParams(temperature=0.9, top_p=0.9, seed=8),
        SamplingParams(temperature=1.1, top_k=5, presence_penalty=1.0, seed=9),
    ]
    rows = [_row(replace(kinds[i % 4]), outputs=(3, 4, i)) for i in range(16)]
    together = _sample(logits, *rows)
    alone = [_sample(logits[i : i + 1], rows[i])[0] for i in range(16)]
    assert together == alone


def test_position_changes_the_draw_and_seed_repeats_it() -> None:
    flat = torch.zeros(1, VOCAB)
    params = SamplingParams(temperature=1.0, seed=3)
    draws = [_sample(flat, _row(params, outputs=(1,) * position))[0] for position in range(20)]
    assert len(set(draws)) > 5
    assert draws == [_sample(flat, _row(params, outputs=(1,) * position))[0] for position in range(20)]


def test_penalties_agree_with_their_definitions() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 5], logits[0, 7], logits[0, 9] = 2.0, 1.9, -1.0
    # 5 is in the prompt: repetition divides it below 7.
    assert _sample(logits, _row(SamplingParams(repetition_penalty=1.5))) == [7]
    # presence and frequency look at the output only.
    assert _sample(logits, _row(SamplingParams(presence_penalty=2.0))) == [5]
    assert _sample(logits, _row(SamplingParams(presence_penalty=0.5), outputs=(5,))) == [7]
    assert _sample(logits, _row(SamplingParams(frequency_penalty=0.06), outputs=(5, 5))) == [7]
    assert _sample(logits, _row(SamplingParams(frequency_penalty=0.06), outputs=(5,))) == [5]


def test_penalty_counts_follow_the_output_as_it_grows_and_after_a_handoff() -> None:
    params = SamplingParams(frequency_penalty=0.5, repetition_penalty=1.2, temperature=1.0, seed=4)
    sampler, logits = Sampler((EOS,), CPU), _logits()
    stayed = _row(params)
    for _ in range(8):
        stayed.output_ids.append(sampler.sample(logits, [stayed])[0].id)
    for length in range(8):
        moved = _row(params, outputs=tuple(stayed.output_ids[:length]))
        assert _sample(logits, moved) == [stayed.output_ids[length]]


def test_bias_and_min_tokens() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, EOS] = 10.0
    assert _sample(logits, _row(SamplingParams())) == [EOS]
    assert _sample(logits, _row(SamplingParams(logit_bias={9: 11.0}))) == [9]
    banned = SamplingParams(min_tokens=2, stop_token_ids=(0,))
    assert _sample(logits, _row(banned))[0] not in (EOS, 0)
    assert _sample(logits, _row(banned, outputs=(1, 1))) == [EOS]
    assert _sample(logits, _row(SamplingParams(min_tokens=2, ignore_eos=True))) == [EOS]


def test_logprobs_are_of_the_models_own_distribution() -> None:
    logits = _logits()
    wanted = torch.log_softmax(logits[0], dim=-1)
    params = SamplingParams(temperature=0.5, top_k=2, seed=1, logprobs=3, logit_bias={4: 50.0})
    token = Sampler((EOS,), CPU).sample(logits, [_row(params)])[0]
    assert token.id == 4
    assert token.logprob == pytest.approx(float(wanted[4]))
    best = wanted.topk(3)
    assert [id_ for id_, _ in token.top_logprobs] == best.indices.tolist()
    assert [value for _, value in token.top_logprobs] == pytest.approx(best.values.tolist())
    assert Sampler((EOS,), CPU).sample(logits, [_row(SamplingParams(logprobs=0))])[0].top_logprobs == ()


@pytest.mark.parametrize("temperature", [5e-324, 1e-308, 1e-40, 1e-31, 1e-30, 1e-20, 1e-6])
@pytest.mark.parametrize("more", [{}, {"top_p": 0.5}, {"min_p": 0.1, "top_k": 5}])
def test_temperatures_so_small_that_logits_leave_their_range_are_greedy(
    temperature: float, more: dict[str, float]
) -> None:
    logits = _logits(8) * 100
    rows = [_row(SamplingParams(temperature=temperature, seed=seed, **more)) for seed in range(8)]
    assert _sample(logits, *rows) == logits.argmax(dim=-1).tolist()


def test_ties_at_such_temperatures_are_greedy_s() -> None:
    logits = torch.full((8, VOCAB), 3.0)
    assert _sample(logits, *[_row(SamplingParams(temperature=1e-308, seed=seed)) for seed in range(8)]) == [0] * 8


EXTREMES = [
    {"temperature": 100},
    {"temperature": 1e-300},
    {"top_p": 1e-300},
    {"top_p": 1 - 2**-53},
    {"min_p": 1.0},
    {"top_k": 2**31 - 1},
    {"top_k": 1},
    {"repetition_penalty": 0.01},
    {"repetition_penalty": 100},
    {"presence_penalty": 2, "frequency_penalty": -2},
    {"logit_bias": dict.fromkeys(range(VOCAB), -100)},
    {"logit_bias": {0: 100, 7: -100}},
    {"min_tokens": 4, "stop_token_ids": tuple(range(VOCAB - 1)), "logit_bias": {VOCAB - 1: -100}},
    {"top_p": 1e-300, "min_p": 1.0, "top_k": VOCAB + 1, "temperature": 0.01},
]


@pytest.mark.parametrize("fields", EXTREMES)
def test_at_the_ends_of_all_ranges_a_token_comes_that_may(fields: dict[str, Any]) -> None:
    """Also where the model says of tokens that they are impossible, certain, or no number at all."""
    logits = _logits(16)
    logits[:, 10:20] = float("-inf")
    logits[:, 20:30] = float("nan")
    logits[8:, 30] = 3e38
    logits[12:, 31] = float("inf")
    params = SamplingParams(**{"temperature": 1.0, "max_tokens": 100, **fields})
    for outputs in ((), (3, 3, 30)):
        rows = [_row(replace(params, seed=seed), outputs=outputs, prompt=(5, 30, 31)) for seed in range(16)]
        picked = _sample(logits, *rows)
        assert all(token < 10 or 30 <= token < VOCAB for token in picked), picked
        assert params.min_tokens <= len(outputs) or set(picked) == {VOCAB - 1}
        impossible = logits.nan_to_num(nan=float("-inf"), neginf=float("-inf"))
        assert picked == _sample(impossible, *rows), "what is no number is as what is impossible"


def test_biases_come_before_penalties_as_in_transformers() -> None:
    from transformers.generation.logits_process import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        SequenceBiasLogitsProcessor,
    )

    logits = _logits(1)
    biases = {5: 4.0, 6: -3.0, 9: 1.5}
    order = LogitsProcessorList(
        [
            SequenceBiasLogitsProcessor([[[token], bias] for token, bias in biases.items()]),
            RepetitionPenaltyLogitsProcessor(1.7),
        ]
    )
    wanted = order(torch.tensor([[5, 6, 9]]), logits.clone())
    params = SamplingParams(logit_bias=biases, repetition_penalty=1.7)
    row = _row(params, outputs=(9,))
    sampler, parcel = Sampler((EOS,), CPU), Parcel(CPU)
    shapings = {0: sampler._shaping(row, parcel)}
    parcel.send()
    assert torch.equal(sampler._shape(logits, [row], shapings), wanted)
    # Where the order decides: 2 + 2 = 4, halved 2; halved first it would be 1 + 2.
    flat = torch.zeros(1, VOCAB)
    flat[0, 5], flat[0, 7] = 2.0, 2.5
    assert _sample(flat, _row(SamplingParams(logit_bias={5: 2.0}, repetition_penalty=2.0))) == [7]
