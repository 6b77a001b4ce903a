"""A body's bytes to GenerateRequests."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from pydantic import ValidationError

from router.doors.http.body import parse
from router.doors.http.fields import UNSUPPORTED, ChatRequest, CompletionRequest
from router.doors.http.prompts import CHAT_TOKENS, chat_request, completion_requests, prompts_of
from tandem.errors import InvalidRequest
from tandem.v1 import generation_pb2
from tandem.wire import sampling_from_wire


def requests_of(**fields: Any) -> list[generation_pb2.GenerateRequest]:
    body = parse(CompletionRequest, json.dumps({"prompt": "x", **fields}).encode())
    return completion_requests(body, prompts_of(body), 2048)


def chat_of(prompt_tokens: int, **fields: Any) -> generation_pb2.GenerateRequest:
    body = json.dumps({"messages": [{"role": "user", "content": "x"}], **fields}).encode()
    return chat_request(parse(ChatRequest, body), [1] * prompt_tokens, 2048)


def test_what_is_not_said_is_as_openai_has_it() -> None:
    [request] = requests_of()
    sampling = sampling_from_wire(request.sampling)
    assert (sampling.temperature, sampling.max_tokens, sampling.top_p, sampling.seed) == (1.0, 16, 1.0, None)
    assert (request.n, request.text, request.keep_special_tokens, sampling.logprobs) == (1, b"x", False, None)
    assert [requests_of(**{name: None}) for name in CompletionRequest.model_fields if name != "prompt"] == [
        [request]
    ] * (len(CompletionRequest.model_fields) - 1)


@pytest.mark.parametrize(
    ("kind", "openais"),
    [
        (CompletionRequest, completion_create_params.CompletionCreateParamsBase),
        (ChatRequest, chat_create_params.CompletionCreateParamsBase),
    ],
)
def test_every_field_of_openai_s_is_taken_or_refused_by_name(kind: Any, openais: Any) -> None:
    asked = openais.__required_keys__ | openais.__optional_keys__
    assert asked - kind.model_fields.keys() - UNSUPPORTED.keys() == set()
    body = {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}
    required = {name: body[name] for name in body.keys() & kind.model_fields.keys()}
    for name in asked & UNSUPPORTED.keys():
        with pytest.raises(InvalidRequest, match=f"^{name} is not supported by this server") as caught:
            parse(kind, json.dumps({**required, name: "some"}).encode())
        assert caught.value.field == name


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [("a", [b"a"]), (["a", "b"], [b"a", b"b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]]), ([[]], [[]])],
)
def test_prompts(prompt: Any, wanted: list[Any]) -> None:
    found = requests_of(prompt=prompt)
    assert [each.text if each.HasField("text") else list(each.token_ids.ids) for each in found] == wanted


@pytest.mark.parametrize(
    "prompt", [None, True, {}, 1, ["a", 1], [1, "a"], [1, True], [[1], "a"], [["a"]], [None], [1.5]]
)
def test_what_is_no_prompt(prompt: Any) -> None:
    with pytest.raises(InvalidRequest, match="prompt must be a string, a list of strings") as caught:
        requests_of(prompt=prompt)
    assert caught.value.field == "prompt"


@pytest.mark.parametrize(("seed", "wanted"), [(0, 0), (-1, 2**64 - 1), (-(2**63), 2**63), (2**64 - 1, 2**64 - 1)])
def test_negative_seeds_are_the_same_64_bits(seed: int, wanted: int) -> None:
    assert requests_of(seed=seed)[0].sampling.seed == wanted


@pytest.mark.parametrize(
    ("prompt_tokens", "fields", "wanted"),
    [
        (10, {}, CHAT_TOKENS),
        (2000, {}, 48),
        (3000, {}, 1),
        (10, {"max_tokens": 5}, 5),
        (10, {"max_completion_tokens": 6}, 6),
        (10, {"max_tokens": 7, "max_completion_tokens": 7}, 7),
    ],
)
def test_how_long_a_chat_answer_may_be(prompt_tokens: int, fields: dict[str, int], wanted: int) -> None:
    assert chat_of(prompt_tokens, **fields).sampling.max_tokens == wanted


@pytest.mark.parametrize(("prompt_tokens", "wanted"), [(1, 16), (2032, 16), (2033, 15), (2047, 1), (3000, 1)])
def test_how_long_a_completion_may_be(prompt_tokens: int, wanted: int) -> None:
    (request,) = requests_of(prompt=[7] * prompt_tokens)
    assert request.sampling.max_tokens == wanted
    assert requests_of(prompt=[7] * prompt_tokens, max_tokens=99)[0].sampling.max_tokens == 99


@pytest.mark.parametrize(("value", "wanted"), [(None, None), (False, None), (0, 0), (5, 5)])
def test_log_probabilities_of_a_completion(value: Any, wanted: int | None) -> None:
    assert sampling_from_wire(requests_of(logprobs=value)[0].sampling).logprobs == wanted


def test_true_is_no_number_of_log_probabilities() -> None:
    with pytest.raises(InvalidRequest, match="logprobs"):
        requests_of(logprobs=True)


@pytest.mark.parametrize(
    ("fields", "wanted"), [({}, None), ({"logprobs": True}, 0), ({"logprobs": True, "top_logprobs": 3}, 3)]
)
def test_log_probabilities_of_a_chat(fields: dict[str, Any], wanted: int | None) -> None:
    assert sampling_from_wire(chat_of(1, **fields).sampling).logprobs == wanted


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"role": "assistant", "content": "x"}, "x"),
        ({"role": "assistant", "content": None}, ""),
        ({"role": "assistant"}, ""),
        ({"role": "assistant", "content": "x", "refusal": None, "tool_calls": [], "unheard_of": {}}, "x"),
        ({"role": "user", "content": "x", "function_call": None}, "x"),
        ({"role": "assistant", "content": "x", "reasoning_content": "", "reasoning": "I thought"}, "x"),
    ],
)
def test_a_message_that_was_an_answer(fields: dict[str, Any], wanted: str) -> None:
    assert parse(ChatRequest, json.dumps({"messages": [fields]}).encode()).messages[0].content == wanted


@pytest.mark.parametrize("value", [0, False, "", "none", [None], {"a": None}])
def test_a_field_of_a_message_that_asks_for_something(value: Any) -> None:
    message = {"role": "user", "content": "x", "refusal": None, "tool_calls": value}
    with pytest.raises(InvalidRequest, match=r"^messages\[0\]\.tool_calls is not supported$") as caught:
        parse(ChatRequest, json.dumps({"messages": [message]}).encode())
    assert caught.value.field == "messages[0].tool_calls"


@pytest.mark.parametrize(
    ("kind", "head", "entry", "tail"),
    [
        (CompletionRequest, b'{"prompt":[', b"1", b',"x"]}'),
        (CompletionRequest, b'{"prompt":[[', b"{}", b"]]}"),
        (CompletionRequest, b'{"prompt":"x","stop":[', b"1", b"]}"),
        (CompletionRequest, b'{"prompt":"x","stop_token_ids":[', b'"1"', b"]}"),
        (CompletionRequest, b'{"prompt":"x","tools":[', b'"1"', b"]}"),
        (ChatRequest, b'{"messages":[', b"{}", b"]}"),
        (ChatRequest, b'{"messages":[{"role":"user","content":[', b"{}", b"]}]}"),
    ],
)
def test_a_body_full_of_errors_is_answered_by_the_first(kind: Any, head: bytes, entry: bytes, tail: bytes) -> None:
    """To describe them all takes tens of seconds of the event loop."""
    assert_few_described(kind, head + b",".join([entry] * (2 << 20)) + tail)


@pytest.mark.parametrize(
    ("kind", "head", "tail"),
    [
        (CompletionRequest, b"{", b"}"),
        (CompletionRequest, b'{"prompt":"x","stream_options":{', b"}}"),
        (ChatRequest, b'{"messages":[{', b"}]}"),
        (ChatRequest, b'{"messages":[{"role":"user","content":[{', b"}]}]}"),
    ],
)
def test_so_is_one_full_of_names(kind: Any, head: bytes, tail: bytes) -> None:
    assert_few_described(kind, head + b",".join(b'"%d":1' % number for number in range(1 << 19)) + tail)


def assert_few_described(kind: Any, body: bytes) -> None:
    with pytest.raises(InvalidRequest) as caught:
        prompts_of(parse(kind, body))
    described = caught.value.__context__
    # Not a string; and of the first part: no type, no text, one name too many.
    assert described is None or isinstance(described, ValidationError)
    assert described is None or described.error_count() <= 4
    assert len(caught.value.message) < 300
