"""Sampling parameters know their limits; fingerprints know how they differ."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from tandem import types
from tandem.errors import InvalidRequest
from tandem.timeline import Phase, Timeline
from tandem.types import Fingerprint, SamplingParams

PRINT = Fingerprint("c" * 64, "w" * 64, "float32", 16, 4, 2, 32, 1)


def test_the_default_is_greedy() -> None:
    params = SamplingParams()
    assert (params.temperature, params.max_tokens, params.seed, params.logprobs) == (0.0, 128, None, None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 2**31),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("min_tokens", -1),
        ("min_tokens", 129),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_k", 2.0),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("min_p", -0.01),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("seed", -1),
        ("seed", 2**64),
        ("logprobs", -1),
        ("logprobs", types.MAX_LOGPROBS + 1),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: 101.0}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", dict.fromkeys(range(types.MAX_LOGIT_BIASES + 1), 1.0)),
        ("stop_token_ids", (-1,)),
        ("logit_bias", {2**32: 1.0}),
        ("stop_token_ids", (2**32,)),
        ("temperature", 10**400),
        ("stop_token_ids", tuple(range(types.MAX_STOP_TOKEN_IDS + 1))),
    ],
)
def test_a_value_out_of_range_names_its_field(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field
    assert caught.value.message.startswith(f"{field} must be ")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("max_tokens", "5", "max_tokens must be a whole number, not '5'"),
        ("temperature", "hot", "temperature must be a number, not 'hot'"),
        ("temperature", True, "temperature must be a number, not True"),
        ("seed", 1.5, "seed must be a whole number or None, not 1.5"),
        ("logprobs", "2", "logprobs must be a whole number or None, not '2'"),
        ("ignore_eos", "no", "ignore_eos must be True or False, not 'no'"),
        ("logit_bias", [(1, 2.0)], "logit_bias must be a mapping of token ids to numbers, not [(1, 2.0)]"),
        ("logit_bias", {"1": 2.0}, "logit_bias must be keyed by token ids in [0, 2^32), not '1'"),
        ("logit_bias", {1: "much"}, "logit_bias must be in [-100, 100], not 'much'"),
        ("stop_token_ids", "12", "stop_token_ids must be a list of token ids, not '12'"),
        ("stop_token_ids", 12, "stop_token_ids must be a list of token ids, not 12"),
        ("stop_token_ids", (1.0,), "stop_token_ids must be token ids in [0, 2^32), not 1.0"),
        ("max_tokens", 0, "max_tokens must be 1 or more, not 0"),
        ("max_tokens", 2**31, "max_tokens must be at most 2147483647, not 2147483648"),
        ("max_tokens", 2**64, "max_tokens must be at most 2147483647, not 18446744073709551616"),
        ("top_k", -1, "top_k must be 0 or more, not -1"),
        ("top_k", 2**31, "top_k must be at most 2147483647, not 2147483648"),
        ("top_k", "x" * 100, f"top_k must be a whole number, not '{'x' * 56}..."),
    ],
)
def test_what_was_wanted_and_what_came_are_said(field: str, value: Any, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{field: value})
    assert (caught.value.message, caught.value.field) == (message, field)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("max_tokens", [1, 2**31 - 1]),
        ("top_k", [0, 2**31 - 1]),
        ("min_tokens", [0, 128]),
        ("temperature", [0, 100]),
        ("top_p", [1e-9, 1]),
        ("min_p", [0, 1]),
        ("repetition_penalty", [0.01, 100]),
        ("presence_penalty", [-2, 2]),
        ("seed", [0, 2**64 - 1, None]),
        ("logprobs", [0, types.MAX_LOGPROBS, None]),
        ("logit_bias", [{}, {0: -100.0, 1: 100.0}]),
    ],
)
def test_limits_themselves_are_allowed(field: str, values: list[Any]) -> None:
    for value in values:
        assert getattr(SamplingParams(**{field: value}), field) == value


def test_values_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        SamplingParams().seed = 1  # type: ignore[misc]


def test_equal_fingerprints_do_not_differ() -> None:
    assert PRINT.difference(replace(PRINT)) is None


@pytest.mark.parametrize(
    ("changed", "words"),
    [({"block_size": 32}, "block_size 16 against 32"), ({"config_hash": "d" * 64}, "config_hash cccccccccccc against")],
)
def test_the_first_difference_is_named(changed: dict[str, Any], words: str) -> None:
    difference = PRINT.difference(replace(PRINT, **changed))
    assert difference is not None
    assert difference.startswith(words)


def test_a_timeline_keeps_the_first_mark_of_a_phase() -> None:
    timeline = Timeline()
    timeline.mark(Phase.ADMITTED, 5.0)
    timeline.mark(Phase.ADMITTED, 9.0)
    assert timeline.phase is Phase.ADMITTED
    assert timeline.between_ms(Phase.RECEIVED, Phase.ADMITTED) == 5.0
    assert timeline.between_ms(Phase.ADMITTED, Phase.FINISHED) is None
    timeline.mark(Phase.FINISHED)
    assert timeline.marks[Phase.FINISHED] <= timeline.now_ms()
