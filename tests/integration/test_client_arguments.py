"""The SDK's surface against a scripted router: what is asked, what is refused before a call, what status says."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from scripted_router import ScriptedRouter, serving

import tandem
from tandem import errors
from tandem.client import AsyncClient, Client
from tandem.v1 import generation_pb2, registry_pb2


@pytest.fixture
def router() -> Iterator[ScriptedRouter]:
    with serving(ScriptedRouter()) as started:
        yield started


def test_every_argument_reaches_the_router(router: ScriptedRouter) -> None:
    with Client(router.address) as client:
        client.complete(
            "p",
            sampling=tandem.SamplingParams(max_tokens=9, seed=3),
            top_k=4,
            n=2,
            stop=["a", "b"],
            model="tiny",
            cache_salt="tenant",
            user_tag="tag",
            keep_special_tokens=True,
        )
    sent = router.requests[0]
    assert (sent.sampling.max_tokens, sent.sampling.seed, sent.sampling.top_k, sent.n) == (9, 3, 4, 2)
    assert (list(sent.stop), sent.model, sent.cache_salt) == (["a", "b"], "tiny", "tenant")
    assert (sent.user_tag, sent.keep_special_tokens) == ("tag", True)


def test_a_prompt_above_the_routers_limit_names_the_prompt(router: ScriptedRouter) -> None:
    with Client(router.address) as client, pytest.raises(errors.InvalidRequest) as caught:
        client.complete("x" * (5 << 20))
    assert caught.value.field == "prompt"


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"prompt": "a\udc80b"}, "prompt"),
        ({"prompt": b"bytes"}, "prompt"),
        ({"prompt": [1, -2]}, "prompt"),
        ({"prompt": [2**32]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": "p", "n": 0}, "n"),
        ({"prompt": "p", "n": 33}, "n"),
        ({"prompt": "p", "stop": ["\ud800"]}, "stop"),
        ({"prompt": "p", "stop": [1]}, "stop"),
        ({"prompt": "p", "model": "\ud800"}, "model"),
        ({"prompt": "p", "timeout_s": 0}, "timeout_s"),
        ({"prompt": "p", "timeout_s": float("nan")}, "timeout_s"),
        ({"prompt": "p", "timeout_s": "soon"}, "timeout_s"),
        ({"prompt": "p", "top_p": 0}, "top_p"),
        ({"prompt": "p", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "p", "temperature": "hot"}, "temperature"),
        ({"prompt": "p", "logit_bias": {2**40: 1.0}}, "logit_bias"),
        ({"prompt": "p", "stop": 5}, "stop"),
        ({"prompt": "p", "stop": b"x"}, "stop"),
        ({"prompt": "p", "keep_special_tokens": "yes"}, "keep_special_tokens"),
        ({"prompt": "p", "timeout_s": 10**400}, "timeout_s"),
        ({"prompt": "p", "sampling": {"max_tokens": 3}}, "sampling"),
        ({"prompt": "p", "sampling": {}, "max_tokens": 3}, "sampling"),
    ],
)
def test_what_no_server_could_accept_is_refused_before_a_call(arguments: dict[str, Any], field: str | None) -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(errors.InvalidRequest) as caught:
        client.generate(**arguments)
    assert caught.value.field == field
    assert f"{field}" in caught.value.message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": [1, -2]}, "prompt[1] must be a token id, a whole number in [0, 2^32), not -2"),
        ({"prompt": ["a"]}, "prompt[0] must be a token id, a whole number in [0, 2^32), not 'a'"),
        ({"prompt": None}, "prompt must be a str or a list of token ids, not None"),
        ({"prompt": "p", "stop": [1]}, "stop must be a str, not 1"),
        ({"prompt": "p", "max_tokens": "5"}, "max_tokens must be a whole number, not '5'"),
    ],
)
def test_a_refusal_shows_the_value_in_python_s_words(arguments: dict[str, Any], message: str) -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(errors.InvalidRequest) as caught:
        client.generate(**arguments)
    assert caught.value.message == message


async def test_an_unknown_keyword_is_a_type_error() -> None:
    async with AsyncClient() as client:
        with pytest.raises(TypeError, match="temprature"):
            client.generate("p", temprature=1)  # type: ignore[call-arg]


BOTH = [registry_pb2.ROLE_PREFILL, registry_pb2.ROLE_DECODE]


def status_with(**integrity: Any) -> generation_pb2.StatusResponse:
    worker = generation_pb2.WorkerStatus(
        hello=registry_pb2.Hello(worker_id="w", roles=BOTH, pid=7, transports=[registry_pb2.Transport(name="grpc")]),
        load=registry_pb2.Load(free_blocks=3, kv_sent={"grpc": registry_pb2.KVTraffic(bytes=7)}),
        cached_blocks=5,
    )
    if integrity:
        worker.integrity.CopyFrom(registry_pb2.Integrity(**integrity))
    return generation_pb2.StatusResponse(version="1", workers=[worker], models=[registry_pb2.ModelInfo(name="tiny")])


async def test_status_and_models_are_typed(router: ScriptedRouter) -> None:
    router.status = status_with(ok=True)
    async with AsyncClient(router.address) as client:
        status, models = await client.status(check_integrity=True), await client.models()
    assert [model.name for model in models] == ["tiny"] == [model.name for model in status.models]
    [worker] = status.workers
    assert (worker.worker_id, worker.pid, worker.load.free_blocks, worker.cached_blocks) == ("w", 7, 3, 5)
    assert worker.roles == {"prefill", "decode"}
    assert worker.transports == ("grpc",)
    assert (worker.load.kv_sent["grpc"].bytes, worker.load.kv_received) == (7, {})
    assert status.problems() == []


@pytest.mark.parametrize(
    ("integrity", "words"),
    [
        ({}, "could not be checked"),
        ({"ok": False, "problem": "block 3 is lost"}, "block 3 is lost"),
        ({"ok": True, "referenced_blocks": 2, "reservations": 1}, "2 referenced blocks and 1 reservations held"),
    ],
)
def test_orphans_are_problems(router: ScriptedRouter, integrity: dict[str, Any], words: str) -> None:
    router.status = status_with(**integrity)
    with Client(router.address) as client:
        [problem] = client.status(check_integrity=True).problems()
    assert words in problem


def test_importing_the_sdk_pulls_no_torch() -> None:
    code = (
        "import sys, tandem; tandem.AsyncClient, tandem.Client, tandem.SamplingParams; tandem.__version__;"
        "print(sorted({'torch', 'transformers', 'ray', 'numba'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout.strip() == "[]"


def test_every_exported_name_resolves() -> None:
    assert all(getattr(tandem, name) is not None for name in tandem.__all__)
    with pytest.raises(AttributeError):
        _ = tandem.nothing  # type: ignore[attr-defined]
