"""Requests that the OpenAI door cannot answer: each is told what is wrong with it, in OpenAI's shape."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from http_house import HttpHouse, error_of, http_configuration, open_http_house

from tandem.config import TINY_MODEL

HALF_A_PAIR = "the body has half of a surrogate pair, which is no character, at line 1"


@pytest.fixture
async def door() -> AsyncIterator[HttpHouse]:
    configuration = http_configuration(max_message_bytes=64 << 10, http_names=["proxy.example"])
    async with open_http_house(configuration) as door:
        await door.house.join("c1")
        yield door
        await door.house.check_empty()


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (b"", None, "the body is not JSON: EOF"),
        (b"{", None, "the body is not JSON: EOF"),
        (b'{"prompt": "x",}', None, "the body is not JSON: trailing comma"),
        (b'{"prompt": "\xff"}', None, "the body is not JSON: invalid unicode code point"),
        (b'{"prompt": "\\u12"}', None, "the body is not JSON: "),
        (b'{"prompt": "\\ud800"}', None, HALF_A_PAIR),
        (b'{"prompt": "\\ud800 and more"}', None, HALF_A_PAIR),
        (b'{"prompt": "\\ud800\\n"}', None, HALF_A_PAIR),
        (b'{"prompt": "\\ud800\\ud800"}', None, HALF_A_PAIR),
        (b'{"prompt": "\\udc00"}', None, HALF_A_PAIR),
        (b'{"prompt": [%s]}' % (b"1" * 5000), None, "the body has a number of more than 4300 digits at line 1"),
        (b'{"prompt": [%s]}' % (b"1" * 4300), "prompt", "token ids in [0, 2^32), not 1111"),
        (b"[" * 60_000, None, "the body is nested too deep at line 1"),
        (b'{"prompt":' * 6_000, None, "the body is nested too deep at line 1"),
        (b"[1]", None, "the body must be a JSON object"),
        (b"null", None, "the body must be a JSON object"),
        (b"{}", "prompt", "prompt is missing"),
        (b'{"prompt": 5}', "prompt", "prompt must be a string, a list of strings"),
        (b'{"prompt": []}', "prompt", "the prompt is empty"),
        (b'{"prompt": [[]]}', "prompt", "the prompt is empty"),
        (b'{"prompt": [-1]}', "prompt", "token ids in [0, 2^32), not -1"),
        (b'{"prompt": ["a", 1]}', "prompt", "prompt must be a string, a list of strings"),
        (b'{"prompt": "x", "max_tokens": "5"}', "max_tokens", "max_tokens must be a valid integer, not '5'"),
        (b'{"prompt": "x", "max_tokens": 1e400}', "max_tokens", "max_tokens must be"),
        (b'{"prompt": "x", "max_tokens": -1}', "max_tokens", "max_tokens must be 1 or more, not -1"),
        (b'{"prompt": "x", "max_tokens": 2147483648}', "max_tokens", "must be at most 2147483647, not 2147483648"),
        (b'{"prompt": "x", "top_k": 2147483648}', "top_k", "top_k must be at most 2147483647, not 2147483648"),
        (b'{"prompt": "x", "temperature": NaN}', "temperature", "temperature must be in [0, 100], not nan"),
        (b'{"prompt": "x", "n": 99}', "n", "n must be less than or equal to 32, not 99"),
        (b'{"prompt": "x", "stream": 1}', "stream", "stream must be a valid boolean, not 1"),
        (b'{"prompt": "x", "stop": [""]}', "stop", "a stop string must not be empty"),
        (b'{"prompt": "x", "stop": 5}', "stop", "stop must be a string or a list of strings, not 5"),
        (b'{"prompt": "x", "stop": [7]}', "stop[0]", "stop[0] must be a valid string, not 7"),
        (b'{"prompt": "x", "logit_bias": {"a": 1}}', "logit_bias", "keyed by token ids, not 'a'"),
        (b'{"prompt": "x", "user": "%s"}' % (b"u" * 300), "user", "user must have at most 256 characters, not 300"),
        (b'{"prompt": "x", "max_tokens": 100000}', "max_tokens", "and max_tokens (100000) together exceed"),
        (b'{"prompt": "x", "logprobs": 21}', "logprobs", "logprobs must be in [0, 20], not 21"),
        (b'{"prompt": "x", "seed": 18446744073709551616}', "seed", "seed must be in [-2^63, 2^64)"),
        (b'{"prompt": "x", "seed": -9223372036854775809}', "seed", "seed must be in [-2^63, 2^64)"),
        (b'{"prompt": "x", "temprature": 1}', "temprature", "no field of this request; did you mean temperature?"),
        (b'{"prompt": "x", "max_completion_tokens": 5}', "max_completion_tokens", "; did you mean max_tokens?"),
        (
            b'{"prompt": %s, "n": 32}' % json.dumps(["x"] * 128).encode(),
            "n",
            "prompt x n (128 x 32) asks for 4096 answers at once; the most this router takes is 1024",
        ),
        (b'{"prompt": "x", "echo": true}', "echo", "echo is not supported by this server (its value was True)"),
        (b'{"prompt": "x", "stream_options": {}}', "stream_options", "stream_options needs stream to be true"),
        (
            b'{"prompt": "x", "stream": true, "stream_options": {"include_obfuscation": true}}',
            "stream_options.include_obfuscation",
            "stream_options.include_obfuscation must be False, not True",
        ),
    ],
)
async def test_a_bad_body_is_told_what_is_wrong(door: HttpHouse, body: bytes, param: str | None, words: str) -> None:
    response = await door.post(body)
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert (error["type"], error["param"]) == ("invalid_request_error", param), error
    assert words in error["message"]
    assert len(error["message"]) < 400


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": []}, "messages", "messages must hold at least 1 entry"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "messages[0].role must be"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "messages[0].content is missing"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
            "messages[0].content[0].type must be 'text', not 'image_url'",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {"type": "x"}}]}
                ]
            },
            "messages[0].content[0].cache_control",
            "messages[0].content[0].cache_control is not supported",
        ),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]", "must be an object, not 'x'"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "must be a string or a list of"),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
            "messages[0].tool_calls",
            "messages[0].tool_calls is not supported",
        ),
        (
            {"messages": [{"role": "assistant", "content": None, "audio": None, "refusal": "no"}]},
            "messages[0].refusal",
            "messages[0].refusal is not supported",
        ),
        ({"tools": [{"type": "function"}]}, "tools", "tools is not supported by this server"),
        ({"response_format": {"type": "json_object"}}, "response_format", "response_format is not supported"),
        ({"top_logprobs": 2}, "top_logprobs", "top_logprobs needs logprobs to be true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "top_logprobs must be in [0, 20], not 21"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "max_completion_tokens must be 1 or more, not 0"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens must be 1 or more, not 0"),
        (
            {"max_completion_tokens": 10**6},
            "max_completion_tokens",
            "and max_completion_tokens (1000000) together exceed",
        ),
        ({"max_completion_tokens": 2, "min_tokens": 3}, "min_tokens", "in [0, max_completion_tokens=2], not 3"),
        ({"max_tokens": 2, "min_tokens": 3}, "min_tokens", "in [0, max_tokens=2], not 3"),
        ({"messages": [{"role": "user", "content": "cat " * 3000}]}, "messages", "the model's limit of 512"),
        (
            {"max_completion_tokens": 2, "logit_bias": {"max_tokens=5": 1}},
            "logit_bias",
            "keyed by token ids, not 'max_tokens=5'",
        ),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens", "say one of them"),
    ],
)
async def test_a_bad_conversation_is_told_what_is_wrong(
    door: HttpHouse, fields: dict[str, Any], param: str, words: str
) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "x"}], **fields}).encode()
    response = await door.post(body, "/v1/chat/completions")
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert error["param"] == param, error
    assert words in error["message"]


async def test_what_asks_for_nothing_is_taken(door: HttpHouse) -> None:
    streamed = {"stream": True, "stream_options": {"include_obfuscation": False, "include_usage": False}}
    assert (await door.complete(**streamed)).status_code == 200
    empty_answer = {"role": "assistant", "content": None, "tool_calls": [], "refusal": None, "annotations": [], "x": {}}
    messages = [{"role": "user", "content": "x", "name": None}, empty_answer, {"role": "user", "content": "y"}]
    chat = {"messages": messages, "logprobs": False, "top_logprobs": 0, "tools": [], "unheard_of": None}
    response = await door.client.post("/v1/chat/completions", json=chat)
    assert response.status_code == 200, response.text
    neutral = {"best_of": 1, "echo": False, "suffix": None, "user": "u", "tools": None, "logprobs": None, "n": None}
    response = await door.complete(**neutral)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
        ("GET", "/health/", 404),
        ("POST", "/v1/completions/", 404),
        ("GET", "/v1/completions", 405),
        ("OPTIONS", "/v1/completions", 405),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/models/none", 404),
        ("GET", "/v1/models/", 404),
        ("GET", "/v1/models//", 404),
    ],
)
async def test_what_is_not_there(door: HttpHouse, method: str, path: str, status: int) -> None:
    response = await door.client.request(method, path, headers={"origin": "http://evil.example"})
    assert response.status_code == status
    assert error_of(response)["type"] == "invalid_request_error"
    assert not [name for name in response.headers if name.startswith("access-control")]
    assert "server" not in response.headers


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/v1/models", "/v1/models/tiny"])
async def test_head_is_get_without_a_body(door: HttpHouse, path: str) -> None:
    response = await door.client.head(path)
    assert (response.status_code, response.content) == (200, b"")
    assert (await door.client.get(path)).headers["content-type"] == response.headers["content-type"]


async def test_a_wrong_method_is_told_the_right_one(door: HttpHouse) -> None:
    response = await door.client.request("PUT", "/v1/completions")
    assert response.headers["allow"] == "POST"
    assert error_of(response)["message"] == "/v1/completions takes POST, not PUT"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
async def test_a_page_in_a_browser_cannot_send_requests_unasked(door: HttpHouse, kind: str) -> None:
    response = await door.client.post("/v1/completions", content=b'{"prompt": "x"}', headers={"content-type": kind})
    assert response.status_code == 415
    assert "application/json" in error_of(response)["message"]


@pytest.mark.parametrize("named", [False, True])
async def test_a_model_without_a_chat_template(tmp_path: Path, named: bool) -> None:
    """One that has several uses the one named default, and chat_template.jinja before all others."""
    path = tmp_path / "tiny"
    path.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_MODEL / name, path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    template = config.pop("chat_template")
    if named:
        config["chat_template"] = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": template}]
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    async with open_http_house(http_configuration(model={"path": str(path)})) as door:
        await door.house.join("c1")
        response = await door.client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]})
        if named:
            assert response.status_code == 200
            return
        assert response.status_code == 400
        assert (
            error_of(response)["message"]
            == "model tiny has no chat template that this server can use: use /v1/completions"
        )


@pytest.mark.parametrize("host", ["127.0.0.1", "LocalHost:8701", "api.localhost", "[::1]:8701", "proxy.example:80"])
async def test_hosts_that_lead_here(door: HttpHouse, host: str) -> None:
    assert (await door.client.get("/v1/models", headers={"host": host})).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example:80", "localhost.evil.example", "[::", "x" * 9000]
)
async def test_a_name_that_was_made_to_lead_here(door: HttpHouse, host: str) -> None:
    answer = await door.post(b'{"prompt": [1], "max_tokens": 1}', host=host)
    assert answer.status_code == 421
    assert error_of(answer)["code"] == "misdirected_request"
    assert len(answer.content) < 500
