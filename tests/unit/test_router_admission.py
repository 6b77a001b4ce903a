from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from typing import Any

import pytest
import tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from router.life.admission import (
    MAX_LABEL_CHARS,
    Admitted,
    ConcurrencyLimit,
    RequestAdmission,
    answers_of,
    choice_seed,
    deadline_s,
)
from router.life.request_log import new_id
from router.tokenizer import INLINE_CHARS, Tokenizer, most_bytes_of_a_token
from tandem.config import TINY_MODEL, ModelConfig, RouterConfig
from tandem.errors import InvalidRequest, ModelNotFound, Overloaded, TandemError
from tandem.tokenizer import load_tokenizer
from tandem.types import MAX_CHOICES, MAX_STOP_STRING_CHARS, MAX_STOP_STRINGS, Fingerprint, ModelInfo, SamplingParams
from tandem.v1.common_pb2 import Sampling
from tandem.v1.generation_pb2 import GenerateRequest, TokenIds
from tandem.wire import sampling_to_wire

TOKENIZER = tokenizers.Tokenizer.from_file(str(TINY_MODEL / "tokenizer.json"))
SERVED = Tokenizer(load_tokenizer(ModelConfig()))
FINGERPRINT = Fingerprint("c", "w", "float32", 16, 2, 2, 8, 1)
MODEL = ModelInfo("tiny", TOKENIZER.get_vocab_size(), 256, (0,), FINGERPRINT, 128)


async def admit(request: GenerateRequest, tokenizer: Tokenizer | None = SERVED, model: Any = MODEL) -> Admitted:
    return await RequestAdmission(tokenizer, lambda: model, 1 << 20).admit(request, new_id())


def ids(*values: int, **fields: Any) -> GenerateRequest:
    return GenerateRequest(token_ids=TokenIds(ids=values), **fields)


def sampling(**fields: Any) -> Sampling:
    return sampling_to_wire(SamplingParams(**fields))


async def test_a_plain_request_gets_defaults_an_id_and_a_seed() -> None:
    one, two = await admit(ids(1, 2)), await admit(ids(1, 2))
    assert one.sampling.seed is not None
    assert one.sampling.max_tokens == SamplingParams().max_tokens
    assert (one.n, one.prompt_ids) == (1, (1, 2))
    assert one.request_id != two.request_id
    assert len(one.request_id) == 32
    assert one.sampling.seed != two.sampling.seed


async def test_text_is_tokenized_once() -> None:
    admitted = await admit(GenerateRequest(text=b"Once upon a time"))
    assert admitted.prompt_ids == tuple(TOKENIZER.encode("Once upon a time").ids)


async def test_long_text_is_tokenized_beside_the_event_loop() -> None:
    text = "word " * INLINE_CHARS
    model = ModelInfo("tiny", MODEL.vocab_size, 10**7, (0,), FINGERPRINT, 128)
    admitted = await admit(GenerateRequest(text=text.encode()), model=model)
    assert admitted.prompt_ids == tuple(TOKENIZER.encode(text).ids)


async def test_every_choice_has_its_own_id_and_seed() -> None:
    admitted = await admit(ids(1, n=3, sampling=sampling(seed=7), cache_salt="tenant"))
    choices = [admitted.choice(index) for index in range(3)]
    assert len({choice.request_id for choice in choices}) == 3
    assert all(choice.request_id.startswith(admitted.request_id) for choice in choices)
    assert [choice.sampling.seed for choice in choices] == [7, choice_seed(7, 1), choice_seed(7, 2)]
    assert len({choice.sampling.seed for choice in choices}) == 3
    assert {choice.cache_salt for choice in choices} == {"tenant"}
    assert admitted.choice(0, attempt=2).attempt == 2


def test_a_single_choice_is_the_request() -> None:
    admitted = asyncio.run(admit(ids(1)))
    assert admitted.choice(0).request_id == admitted.request_id


def test_choice_seeds_are_stable() -> None:
    assert choice_seed(5, 0) == 5
    assert choice_seed(5, 1) == choice_seed(5, 1) != choice_seed(6, 1)
    assert 0 <= choice_seed(2**64 - 1, 31) < 2**64


WRONG: list[tuple[GenerateRequest, str, str]] = [
    (GenerateRequest(), "prompt", "no prompt"),
    (GenerateRequest(text=b""), "prompt", "empty"),
    (ids(), "prompt", "empty"),
    (GenerateRequest(text=b"ab\xff"), "prompt", "not valid UTF-8 at byte 2"),
    (ids(MODEL.vocab_size), "prompt", f"below {MODEL.vocab_size}"),
    (ids(*range(1, 257)), "prompt", "the prompt has 256 tokens; the model's limit is 256"),
    (ids(1, sampling=sampling(max_tokens=256)), "max_tokens", "exceed the model's limit of 256"),
    (ids(1, sampling=sampling(logit_bias={MODEL.vocab_size: 1.0})), "logit_bias", f"below {MODEL.vocab_size}"),
    (ids(1, sampling=sampling(stop_token_ids=(MODEL.vocab_size,))), "stop_token_ids", f"below {MODEL.vocab_size}"),
    (ids(1, sampling=Sampling()), "max_tokens", "1 or more"),
    (ids(1, n=MAX_CHOICES + 1), "n", f"{MAX_CHOICES}"),
    (ids(1, stop=[""]), "stop", "not be empty"),
    (ids(1, stop=["x" * (MAX_STOP_STRING_CHARS + 1)]), "stop", f"{MAX_STOP_STRING_CHARS} characters"),
    (ids(1, stop=["x"] * (MAX_STOP_STRINGS + 1)), "stop", f"at most {MAX_STOP_STRINGS} strings"),
    (ids(1, cache_salt="x" * (MAX_LABEL_CHARS + 1)), "cache_salt", f"{MAX_LABEL_CHARS}"),
    (ids(1, user_tag="x" * (MAX_LABEL_CHARS + 1)), "user_tag", f"{MAX_LABEL_CHARS}"),
]


@pytest.mark.parametrize(("request_", "field", "message"), WRONG)
async def test_a_wrong_field_is_named_with_its_limit(request_: GenerateRequest, field: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        await admit(request_)
    assert caught.value.field == field


async def test_the_longest_request_that_fits_is_taken() -> None:
    assert (await admit(ids(1, sampling=sampling(max_tokens=255)))).sampling.max_tokens == 255


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (GenerateRequest(text=b"hi"), "the prompt must be token ids"),
        (ids(1, stop=["x"]), "stop strings need a tokenizer"),
    ],
)
async def test_without_a_tokenizer_only_token_ids(request_: GenerateRequest, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        await admit(request_, tokenizer=None)
    assert (await admit(ids(1), tokenizer=None)).prompt_ids == (1,)


async def test_an_unknown_model_is_told_what_is_served() -> None:
    with pytest.raises(ModelNotFound, match="'huge' is not served; served: tiny"):
        await admit(ids(1, model="huge"))
    assert (await admit(ids(1, model="tiny"))).model is MODEL


def test_the_gate_counts_who_is_inside() -> None:
    gate = ConcurrencyLimit(1)
    with gate.enter():
        with pytest.raises(Overloaded) as caught, gate.enter():
            pass
        assert caught.value.retry_after_ms
    with pytest.raises(TandemError), gate.enter():
        raise TandemError("left by an error")
    with gate.enter():
        pass


def test_the_gate_counts_answers() -> None:
    gate = ConcurrencyLimit(4)
    with gate.enter(3):
        with pytest.raises(Overloaded, match="3 answers are under way, and 2 more"), gate.enter(2):
            pass
        with gate.enter(1):
            pass
    with pytest.raises(InvalidRequest, match="5 answers at once; the most this router takes is 4"), gate.enter(5):
        pass
    with gate.enter(4):
        pass
    assert [answers_of(GenerateRequest(n=n)) for n in (0, 1, 7, 10**6)] == [1, 1, 7, MAX_CHOICES]


@pytest.mark.parametrize(("remaining", "expected"), [(None, 10.0), (3.0, 3.0), (99.0, 20.0), (0.0, 0.0)])
def test_one_deadline(remaining: float | None, expected: float) -> None:
    assert deadline_s(remaining, RouterConfig(default_deadline_s=10, max_deadline_s=20)) == expected


async def test_a_text_that_can_never_fit_is_refused_before_it_is_tokenized() -> None:
    longest = most_bytes_of_a_token(TOKENIZER)
    assert longest == max(len(TOKENIZER.decode([id_], skip_special_tokens=False)) for id_ in range(MODEL.vocab_size))
    text = b"cat " * (1 << 20)
    started = time.thread_time()
    with pytest.raises(InvalidRequest, match="4194304 bytes, which are more tokens than the model's limit of 256"):
        await admit(GenerateRequest(text=text))
    assert time.thread_time() - started < 0.1


async def test_the_longest_text_that_may_fit_is_tokenized() -> None:
    longest = most_bytes_of_a_token(TOKENIZER)
    assert longest is not None
    limit = INLINE_CHARS // longest + 1
    text = ("cat " * INLINE_CHARS)[: longest * limit]
    assert len(await SERVED.encode(text, limit)) > limit, "the caller counts"
    with pytest.raises(InvalidRequest, match=f"{longest * limit + 1} bytes"):
        await SERVED.encode(text + "c", limit)


def _without_a_byte(model: dict[str, Any]) -> dict[str, int]:
    merged = {character for pair in model["merges"] for part in pair for character in part}
    left_out = next(character for character in ByteLevel.alphabet() if character not in merged)
    return {token: id_ for token, id_ in model["vocab"].items() if token != left_out}


def test_what_shortens_text_has_no_longest_token() -> None:
    state = json.loads(TOKENIZER.to_str())
    for changes in (
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"truncation": {"max_length": 8, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}},
        {"added_tokens": [{**state["added_tokens"][0], "rstrip": True}]},
        {"added_tokens": [{**state["added_tokens"][0], "lstrip": True}]},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}]}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [state["pre_tokenizer"]] * 2}},
        {"model": {**state["model"], "end_of_word_suffix": "</w>"}},
        {"model": {**state["model"], "vocab": _without_a_byte(state["model"])}},
        {"model": {"type": "WordLevel", "vocab": state["model"]["vocab"], "unk_token": "e"}},
    ):
        assert most_bytes_of_a_token(tokenizers.Tokenizer.from_str(json.dumps({**state, **changes}))) is None, changes
    split = {"type": "Split", "pattern": {"Regex": "[0-9]"}, "behavior": "Isolated", "invert": False}
    for behaviour, known in (("Isolated", True), ("Removed", False)):
        steps = [{**split, "behavior": behaviour}, state["pre_tokenizer"]]
        changed = {**state, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}
        assert (most_bytes_of_a_token(tokenizers.Tokenizer.from_str(json.dumps(changed))) is not None) is known


async def test_min_tokens_that_leave_no_token() -> None:
    few = replace(MODEL, vocab_size=4, eos_token_ids=(0,))
    sampling = SamplingParams(max_tokens=3, min_tokens=1, stop_token_ids=(1, 2, 3))
    with pytest.raises(InvalidRequest, match="stop_token_ids hold all 4 tokens") as caught:
        await admit(ids(1, sampling=sampling_to_wire(sampling)), model=few)
    assert caught.value.field == "min_tokens"
    for harmless in (replace(sampling, min_tokens=0), replace(sampling, ignore_eos=True)):
        assert (await admit(ids(1, sampling=sampling_to_wire(harmless)), model=few)).sampling.seed is not None
