"""Everything wrong that can reach the service: a typed error naming field and limit each time, and no harm done."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import grpc
import pytest
from direct import DirectRouter
from model_zoo import save_model
from service import Process, Service, running_service, wait_until

from kv_transfer.ends.link import MAX_MESSAGE_BYTES
from kv_transfer.frames.codec import decode, encode
from kv_transfer.frames.messages import Open
from tandem import rpc
from tandem.config import TINY_MODEL
from tandem.errors import InvalidRequest, ModelNotFound, Overloaded, Refused, TandemError, TransferFailed
from tandem.types import Role
from tandem.v1 import common_pb2, generation_pb2, generation_pb2_grpc

# 1024 tokens of KV; the model would take 2048.
BLOCKS, VOCABULARY, MODEL_LENGTH = 64, 1536, 2048
MAX_MESSAGE = 1 << 20


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running_service(
        tmp_path_factory.mktemp("bad"),
        engine={"num_blocks": BLOCKS},
        router={"heartbeat_interval_s": 0.1, "max_message_bytes": MAX_MESSAGE},
    ) as service:
        yield service


@pytest.fixture(autouse=True)
def _healthy(service: Service) -> Iterator[None]:
    yield
    assert service.client.complete("The color of dog").text == " can vary widely"
    wait_until(service.idle, 3, "nothing leaked")


# Requests, as raw messages: the SDK refuses half of them itself.


def ask(service: Service, **fields: Any) -> TandemError:
    """The error of a request that is good but for these fields."""
    sampling = fields.pop("sampling", {})
    good = {"max_tokens": 4, "top_p": 1.0, "repetition_penalty": 1.0}
    prompt = {} if {"text", "token_ids", "no_prompt"} & fields.keys() else {"text": b"The color of dog"}
    fields.pop("no_prompt", None)
    message = generation_pb2.GenerateRequest(sampling=common_pb2.Sampling(**{**good, **sampling}), **prompt, **fields)
    with grpc.insecure_channel(service.address, options=rpc.client_options(1 << 28)) as channel:
        stub: Any = generation_pb2_grpc.GenerationStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(message, timeout=10))
    return rpc.error_from_rpc(caught.value)


def ids(*values: int) -> generation_pb2.TokenIds:
    return generation_pb2.TokenIds(ids=values)


BAD_REQUESTS: dict[str, tuple[dict[str, Any], type[TandemError], str, list[str]]] = {
    "no prompt": ({"no_prompt": True}, InvalidRequest, "prompt", ["no prompt"]),
    "empty text": ({"text": b""}, InvalidRequest, "prompt", ["empty"]),
    "no token ids": ({"token_ids": ids()}, InvalidRequest, "prompt", ["empty"]),
    "token id at the vocabulary's end": ({"token_ids": ids(5, VOCABULARY)}, InvalidRequest, "prompt", ["below 1536"]),
    "token id far out of range": ({"token_ids": ids(2**32 - 1)}, InvalidRequest, "prompt", ["below 1536"]),
    "prompt over the model's length": (
        {"token_ids": ids(*[5] * MODEL_LENGTH)},
        InvalidRequest,
        "prompt",
        ["2048 tokens", "limit is 2048"],
    ),
    "prompt and output over the model's length": (
        {"token_ids": ids(*[5] * 2000), "sampling": {"max_tokens": 49}},
        InvalidRequest,
        "max_tokens",
        ["prompt (2000)", "max_tokens (49)", "limit of 2048"],
    ),
    "prompt larger than the KV pool": (
        {"token_ids": ids(*[5] * 1500)},
        InvalidRequest,
        "prompt",
        ["1500 tokens", "holds 1024"],
    ),
    "prompt and output larger than the KV pool": (
        {"token_ids": ids(*[5] * 1000), "sampling": {"max_tokens": 100}},
        InvalidRequest,
        "max_tokens",
        ["1099 tokens", "holds 1024"],
    ),
    "unknown model": ({"model": "gpt-7"}, ModelNotFound, "model", ["'gpt-7' is not served", "served: tiny"]),
    "invalid UTF-8": ({"text": b"The color \xff of"}, InvalidRequest, "prompt", ["not valid UTF-8 at byte 10"]),
    "cut UTF-8": ({"text": "Caf\u00e9".encode()[:-1]}, InvalidRequest, "prompt", ["not valid UTF-8 at byte 3"]),
    "too many answers": ({"n": 1000}, InvalidRequest, "n", ["[1, 32]", "1000"]),
    "empty stop string": ({"stop": [""]}, InvalidRequest, "stop", ["empty"]),
    "no sampling limit": ({"sampling": {"max_tokens": 0}}, InvalidRequest, "max_tokens", ["1 or more", "0"]),
    "huge max_tokens": ({"sampling": {"max_tokens": 2**32 - 1}}, InvalidRequest, "max_tokens", ["at most 2147483647"]),
    "huge top_k": ({"sampling": {"top_k": 2**32 - 1}}, InvalidRequest, "top_k", ["at most 2147483647", "4294967295"]),
    "min over max": ({"sampling": {"min_tokens": 5}}, InvalidRequest, "min_tokens", ["max_tokens=4", "5"]),
    "too many logprobs": ({"sampling": {"logprobs": 1000}}, InvalidRequest, "logprobs", ["[0, 20]", "1000"]),
    "bias outside the vocabulary": (
        {"sampling": {"logit_bias": {VOCABULARY: 1.0}}},
        InvalidRequest,
        "logit_bias",
        ["below 1536"],
    ),
    "stop token outside the vocabulary": (
        {"sampling": {"stop_token_ids": [VOCABULARY]}},
        InvalidRequest,
        "stop_token_ids",
        ["below 1536"],
    ),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_requests_are_told_what_is_wrong(service: Service, name: str) -> None:
    fields, kind, field, words = BAD_REQUESTS[name]
    error = ask(service, **fields)
    assert type(error) is kind
    assert error.field == field
    assert [word for word in words if word not in error.message] == [], error.message


REAL = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


@pytest.mark.parametrize("field", [*REAL, "logit_bias"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1000.0])
def test_negative_and_not_finite_sampling_values_are_refused(service: Service, field: str, value: float) -> None:
    error = ask(service, sampling={field: {7: value} if field == "logit_bias" else value})
    assert type(error) is InvalidRequest
    assert error.field == field
    assert f"not {value}" in error.message
    assert "in [" in error.message or "in (" in error.message


def test_a_message_over_the_cap_is_refused(service: Service) -> None:
    error = ask(service, text=b"x" * (MAX_MESSAGE + 1))
    assert type(error) is Overloaded
    assert str(MAX_MESSAGE) in error.message
    with pytest.raises(InvalidRequest, match=str(MAX_MESSAGE)) as caught:
        service.client.complete("x" * (MAX_MESSAGE + 1))
    assert caught.value.field == "prompt"


@pytest.mark.parametrize(
    "noise", [b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 4096, None]
)
def test_noise_on_the_routers_socket_disturbs_nobody(service: Service, noise: bytes | None) -> None:
    send_noise(service.address, noise or os.urandom(100_000))


def send_noise(address: str, noise: bytes) -> None:
    """Returns when the server has hung up."""
    host, port = address.split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        try:
            connection.sendall(noise)
            while connection.recv(4096):
                pass
        except ConnectionError:
            pass


# The KV port.


def flip_last(frame: bytes) -> bytes:
    return frame[:-1] + bytes([frame[-1] ^ 1])


def other_block_size(frame: bytes) -> bytes:
    opening, _ = decode(frame)
    assert isinstance(opening, Open)
    return encode(replace(opening, fingerprint=replace(opening.fingerprint, block_size=32)))


Spoil = Callable[[list[bytes]], list[bytes]]
SPOILED: dict[str, tuple[Spoil, type[TandemError], str]] = {
    "garbage after the opening": (lambda frames: [frames[0], os.urandom(500)], TransferFailed, "not a KV frame"),
    "empty frame": (lambda frames: [frames[0], b""], TransferFailed, "a KV frame of 0 bytes"),
    "truncated frame": (lambda frames: [frames[0], frames[1][:-9]], TransferFailed, "carries"),
    "truncated header": (lambda frames: [frames[0], frames[1][:30]], TransferFailed, "too long or cut short"),
    "corrupt payload": (
        lambda frames: [*frames[:2], flip_last(frames[2]), *frames[3:]],
        TransferFailed,
        "payload of KV frame 1 fails its checksum",
    ),
    "corrupt seal": (lambda frames: [*frames[:-1], flip_last(frames[-1])], TransferFailed, "fails its checksum"),
    "truncated stream": (lambda frames: frames[:3], TransferFailed, "left before the seal"),
    "another block size": (
        lambda frames: [other_block_size(frames[0]), *frames[1:]],
        Refused,
        "block_size 16 against 32",
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_spoiled_transfers_fail_and_free_their_reservation(service: Service, name: str) -> None:
    spoil, kind, words = SPOILED[name]
    with DirectRouter(service.worker_of(Role.DECODE)) as direct:
        request = direct.request("spoiled")
        frames = direct.frames(request, direct.reserve(request))
        with pytest.raises(kind, match=words):
            direct.push(spoil(frames))
        wait_until(service.idle, 1, "the reservation freed, though its lease goes on")
        with pytest.raises(TransferFailed, match="no such reservation"):
            direct.push(frames)


def test_a_whole_transfer_is_taken(service: Service) -> None:
    """Or the spoiled ones would prove nothing."""
    with DirectRouter(service.worker_of(Role.DECODE)) as direct:
        request = direct.request("whole")
        assert direct.push(direct.frames(request, direct.reserve(request))).frames == 4
        assert next(direct.tokens).requests[0].position == 1


@pytest.mark.parametrize("opening", [b"", b"\x00" * 12, b"TKVF" + os.urandom(5000), os.urandom(5000)])
def test_garbage_instead_of_an_opening_finds_no_reservation(service: Service, opening: bytes) -> None:
    with DirectRouter(service.worker_of(Role.DECODE)) as direct:
        request = direct.request("waits")
        frames = direct.frames(request, direct.reserve(request))
        with pytest.raises(TransferFailed):
            direct.push([opening])
        assert direct.push(frames).frames == 4, "its true sender still gets through"


def test_a_frame_over_the_cap_is_refused(service: Service) -> None:
    with DirectRouter(service.worker_of(Role.DECODE)) as direct:
        request = direct.request("large")
        frames = direct.frames(request, direct.reserve(request))
        with pytest.raises(Overloaded, match=str(MAX_MESSAGE_BYTES)):
            direct.push([frames[0], bytes(MAX_MESSAGE_BYTES + 1)])
        wait_until(service.idle, 1, "the reservation freed")


def test_noise_on_the_kv_socket_disturbs_nobody(service: Service) -> None:
    send_noise(service.worker_of(Role.DECODE).address, os.urandom(100_000))


# Processes that cannot start or may not join: exit code 2 and a reason, all started at once.


@pytest.fixture(scope="module")
def misfits(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Process]]:
    folder = tmp_path_factory.mktemp("misfits")
    # Of the served one's name: it is refused for what it is.
    other = save_model("llama", folder / TINY_MODEL.name)
    port = int(service.address.rpartition(":")[2])
    missing = {"model": {"path": str(folder / "missing")}}
    worker = ("decode_worker", "--router", service.address)
    started = {
        "unknown key": service_process(service, "router-key", ("router",), router={"max_live_request": 1}),
        "missing model": service_process(service, "missing", worker, **missing),
        "missing model of the router": service_process(service, "router-missing", ("router",), **missing),
        "router's port in use": service_process(service, "router-port", ("router", "--port", str(port))),
        "worker's port in use": service_process(service, "port", (*worker, "--port", str(port))),
        "other model": service_process(service, "other", worker, model={"path": str(other)}),
        "other block size": service_process(service, "blocks", worker, engine={"block_size": 32}),
    }
    yield started
    for process in started.values():
        process.stop()


def service_process(service: Service, name: str, command: tuple[str, ...], **sections: dict[str, Any]) -> Process:
    process = service.start(name, *command, **sections)
    del service.processes[process.name]  # it is not meant to live
    return process


SAID = {
    "unknown key": ["unknown config key router.max_live_request; did you mean router.max_live_requests?"],
    "missing model": ["model.path", "no such directory", "missing"],
    "missing model of the router": ["model.path", "no such directory", "missing"],
    "router's port in use": ["cannot listen on 127.0.0.1:", "port is in use"],
    "worker's port in use": ["cannot listen on 127.0.0.1:", "port is in use"],
    "other model": ["the router refused worker", "vocab_size 128 against 1536"],
    "other block size": ["the router refused worker", "block_size 32 against 16"],
}


@pytest.mark.parametrize("name", SAID)
def test_processes_that_do_not_fit_end_with_code_2_and_say_why(
    service: Service, misfits: dict[str, Process], name: str
) -> None:
    process = misfits[name]
    assert process.wait_exit() == 2, process.output
    assert [words for words in SAID[name] if words not in process.output] == [], process.output
    assert "Traceback" not in process.output
    if name.startswith("other"):
        assert "refused worker" in service.router.output
        assert SAID[name][1] in service.router.output
    assert len(service.status().workers) == 2
