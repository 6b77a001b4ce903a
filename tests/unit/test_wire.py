"""Values to messages and back: nothing is lost, and what came from a wire is checked."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem import errors, types, wire
from tandem.timeline import Phase, Timeline
from tandem.types import FinishReason, Role
from tandem.v1 import common_pb2, generation_pb2, registry_pb2, worker_pb2

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
FINITE = st.floats(allow_nan=False, allow_infinity=False)


def reals(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False)


@st.composite
def sampling(draw: st.DrawFn) -> types.SamplingParams:
    most = draw(st.integers(1, 2**31 - 1))
    return types.SamplingParams(
        max_tokens=most,
        min_tokens=draw(st.integers(0, most)),
        temperature=draw(reals(0, 100)),
        top_k=draw(st.integers(0, 2**31 - 1)),
        top_p=draw(reals(1e-9, 1)),
        min_p=draw(reals(0, 1)),
        repetition_penalty=draw(reals(0.01, 100)),
        presence_penalty=draw(reals(-2, 2)),
        frequency_penalty=draw(reals(-2, 2)),
        logit_bias=draw(st.dictionaries(U32, reals(-100, 100), max_size=5)),
        seed=draw(st.none() | U64),
        stop_token_ids=tuple(draw(st.lists(U32, max_size=5))),
        ignore_eos=draw(st.booleans()),
        logprobs=draw(st.none() | st.integers(0, types.MAX_LOGPROBS)),
    )


TOKENS = st.builds(
    types.Token,
    id=U32,
    logprob=st.none() | FINITE,
    top_logprobs=st.lists(st.tuples(U32, FINITE), max_size=3).map(tuple),
)
FINGERPRINTS = st.builds(
    types.Fingerprint,
    config_hash=TEXT,
    weights_hash=TEXT,
    dtype=TEXT,
    block_size=U32,
    num_layers=U32,
    num_kv_heads=U32,
    head_dim=U32,
    layout=U32,
)
MODELS = st.builds(
    types.ModelInfo,
    name=TEXT,
    vocab_size=U32,
    max_model_len=U32,
    eos_token_ids=st.lists(U32, max_size=3).map(tuple),
    fingerprint=FINGERPRINTS,
    hidden_size=U32,
)
REPORTS = st.builds(
    types.RequestReport,
    timeline=st.builds(Timeline, st.dictionaries(st.sampled_from(Phase), FINITE), st.just(0.0)),
    kv_bytes=U64,
    kv_frames=U32,
    kv_reused_tokens=U32,
    kv_transfer_ms=FINITE,
    transport=TEXT,
    prefill_worker=TEXT,
    decode_worker=TEXT,
)
EVENTS = st.one_of(
    st.builds(types.Accepted, TEXT, U32),
    st.builds(types.Delta, U32, st.lists(TOKENS, max_size=3).map(tuple), TEXT),
    st.builds(
        types.ChoiceFinished,
        choice=U32,
        reason=st.sampled_from(FinishReason),
        output_tokens=U32,
        report=REPORTS,
        stop=st.none() | TEXT.filter(bool),
    ),
    st.builds(types.Completed, st.builds(types.Usage, U32, U32, U32)),
)


@given(sampling())
def test_sampling(params: types.SamplingParams) -> None:
    sent = common_pb2.Sampling.FromString(wire.sampling_to_wire(params).SerializeToString())
    assert wire.sampling_from_wire(sent) == params


@given(st.builds(types.EngineRequest, TEXT, st.lists(U32, max_size=9).map(tuple), sampling(), U32, TEXT))
def test_engine_requests(request: types.EngineRequest) -> None:
    sent = worker_pb2.EngineRequest.FromString(wire.request_to_wire(request).SerializeToString())
    assert wire.request_from_wire(sent) == request


@given(TOKENS)
def test_tokens(token: types.Token) -> None:
    assert wire.token_from_wire(common_pb2.Token.FromString(wire.token_to_wire(token).SerializeToString())) == token


@given(MODELS)
def test_models(model: types.ModelInfo) -> None:
    sent = registry_pb2.ModelInfo.FromString(wire.model_to_wire(model).SerializeToString())
    assert wire.model_from_wire(sent) == model


def without_clock(event: types.Event) -> Any:
    """A timeline's start is this process's clock and does not travel."""
    if isinstance(event, types.ChoiceFinished):
        report = vars(event.report) | {"timeline": event.report.timeline.marks}
        return vars(event) | {"report": report}
    return event


@given(EVENTS)
def test_events(event: types.Event) -> None:
    sent = generation_pb2.GenerateEvent.FromString(wire.event_to_wire(event).SerializeToString())
    assert without_clock(wire.event_from_wire(sent)) == without_clock(event)


@given(st.frozensets(st.sampled_from(Role)))
def test_roles(roles: frozenset[Role]) -> None:
    assert wire.roles_from_wire(wire.roles_to_wire(roles)) == roles


def test_roles_of_a_later_version_are_left_out() -> None:
    assert wire.roles_from_wire([registry_pb2.ROLE_PREFILL, registry_pb2.ROLE_UNSPECIFIED]) == {Role.PREFILL}


@pytest.mark.parametrize("reason", [None, *FinishReason])
def test_reasons(reason: FinishReason | None) -> None:
    assert wire.reason_from_wire(wire.reason_to_wire(reason)) is reason


def test_marks_travel_in_the_order_of_the_phases() -> None:
    timeline = Timeline({Phase.FINISHED: 9.0, Phase.RECEIVED: 0.0, Phase.FIRST_TOKEN: 4.0})
    marks = wire.report_to_wire(types.RequestReport(timeline)).marks
    assert [mark.phase for mark in marks] == ["received", "first_token", "finished"]


@pytest.mark.parametrize("kind", sorted(set(errors.CODES.values()), key=lambda kind: kind.__name__))
def test_failures_keep_their_class(kind: type[errors.TandemError]) -> None:
    back = wire.failure_from_wire(wire.failure_to_wire(kind("because")))
    assert type(back) is errors.CODES[kind.code]
    assert back.message == "because"


def test_a_failure_of_a_later_version_is_internal() -> None:
    assert type(wire.failure_from_wire(common_pb2.Failure(code="new", message="m"))) is errors.InternalError


def test_decoding_checks_limits() -> None:
    with pytest.raises(errors.InvalidRequest) as caught:
        wire.sampling_from_wire(common_pb2.Sampling(max_tokens=1, top_p=2.0))
    assert caught.value.field in {"top_p", "repetition_penalty"}


def test_an_unknown_event_is_an_error() -> None:
    with pytest.raises(errors.InternalError, match="unknown event"):
        wire.event_from_wire(generation_pb2.GenerateEvent())


@pytest.mark.parametrize(("count", "width"), [(1, 1), (1, 64), (64, 16), (64, 4096)])
def test_an_answer_of_vectors_is_no_larger_than_foretold(count: int, width: int) -> None:
    most = generation_pb2.Usage(prompt_tokens=2**32 - 1, output_tokens=2**32 - 1, cached_prompt_tokens=2**32 - 1)
    vectors = [generation_pb2.Embedding(values=bytes(4 * width)) for _ in range(count)]
    size = generation_pb2.EmbedResponse(embeddings=vectors, usage=most).ByteSize()
    assert size <= wire.embed_response_bytes(count, width) <= size + 12 * count + 24
