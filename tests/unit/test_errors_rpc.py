"""The error tree, and its one translation to and from gRPC."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from tandem import errors, rpc
from tandem.v1 import generation_pb2, generation_pb2_grpc

KINDS = sorted(set(errors.CODES.values()), key=lambda kind: kind.__name__)


class Service(generation_pb2_grpc.GenerationServicer):
    """Fails as it is told to."""

    failure: BaseException = errors.InternalError("not told")
    plain: grpc.StatusCode | None = None

    async def Status(self, request: Any, context: Any) -> Any:
        if self.plain is not None:
            await context.abort(self.plain, "said gRPC itself")
        raise self.failure

    async def Generate(self, request: Any, context: Any) -> None:
        await context.write(generation_pb2.GenerateEvent())
        raise self.failure


@pytest.fixture
async def service() -> AsyncIterator[tuple[Service, Any]]:
    servicer, server = Service(), rpc.make_server()
    generation_pb2_grpc.add_GenerationServicer_to_server(servicer, server)
    port = rpc.bind(server, "127.0.0.1", 0)
    await server.start()
    async with rpc.make_channel(f"127.0.0.1:{port}") as channel:
        yield servicer, generation_pb2_grpc.GenerationStub(channel)
    await server.stop(0)


async def failure_of(call: Any) -> errors.TandemError:
    with pytest.raises(grpc.RpcError) as caught:
        await asyncio.wait_for(call, 10)
    return rpc.error_from_rpc(caught.value)


def test_every_class_is_in_the_tree_under_its_own_code() -> None:
    assert len(KINDS) == len(errors.CODES)
    assert all(errors.CODES[kind.code] is kind for kind in KINDS)
    assert all(kind.__name__ in (errors.__doc__ or "") for kind in KINDS)


def test_an_unknown_code_is_internal() -> None:
    error = errors.from_code("from the future", "m", field="f", retry_after_ms=7)
    assert type(error) is errors.InternalError
    assert (error.message, error.field, error.retry_after_ms) == ("m", "f", 7)


@pytest.mark.parametrize("kind", KINDS)
def test_every_class_has_a_status(kind: type[errors.TandemError]) -> None:
    status = rpc.status_of(kind("m"))
    assert status.grpc is not grpc.StatusCode.OK
    assert 400 <= status.http < 600


def test_a_class_without_a_line_takes_its_bases_status() -> None:
    assert rpc.status_of(errors.WorkerLost("m")) == (grpc.StatusCode.UNAVAILABLE, 503)


@pytest.mark.parametrize("retry", ["soon", "-5", "1e3", "", "9" * 5000, "\u0665"])
def test_a_retry_hint_that_is_no_count_is_no_hint(retry: str) -> None:
    """A peer wrote it; int() of a long text would raise, and so take the error's place."""
    trailing = grpc.aio.Metadata(("tandem-code", "overloaded"), ("tandem-retry-after-ms", retry))
    status = grpc.aio.AioRpcError(grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.aio.Metadata(), trailing, "full")
    error = rpc.error_from_rpc(status)
    assert isinstance(error, errors.Overloaded)
    assert error.retry_after_ms is None


@pytest.mark.parametrize("kind", KINDS)
async def test_errors_cross_a_real_socket(service: tuple[Service, Any], kind: type[errors.TandemError]) -> None:
    servicer, stub = service
    servicer.failure = kind("no, because", field="top_p", retry_after_ms=1500)
    error = await failure_of(stub.Status(generation_pb2.StatusRequest()))
    assert type(error) is kind
    assert (error.message, error.field, error.retry_after_ms) == ("no, because", "top_p", 1500)


async def test_an_error_ends_a_stream_after_what_was_written(service: tuple[Service, Any]) -> None:
    servicer, stub = service
    servicer.failure = errors.WorkerLost("it died")
    call = stub.Generate(generation_pb2.GenerateRequest())
    assert await call.read() == generation_pb2.GenerateEvent()
    error = await failure_of(call.read())
    assert (type(error), error.field, error.retry_after_ms) == (errors.WorkerLost, None, None)


async def test_a_bug_is_logged_here_and_not_told_to_the_peer(
    service: tuple[Service, Any], caplog: pytest.LogCaptureFixture
) -> None:
    servicer, stub = service
    servicer.failure = ValueError("the secret of a tenant")
    with caplog.at_level(logging.ERROR):
        error = await failure_of(stub.Status(generation_pb2.StatusRequest()))
    assert type(error) is errors.InternalError
    assert "secret" not in error.message
    assert "the secret of a tenant" in caplog.text


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, errors.InvalidRequest),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.Overloaded),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineExceeded),
        (grpc.StatusCode.CANCELLED, errors.Cancelled),
        (grpc.StatusCode.UNAVAILABLE, errors.Unavailable),
        (grpc.StatusCode.UNIMPLEMENTED, errors.Refused),
        (grpc.StatusCode.UNKNOWN, errors.InternalError),
    ],
)
async def test_what_no_tandem_process_sent_is_translated_by_meaning(
    service: tuple[Service, Any], status: grpc.StatusCode, kind: type[errors.TandemError]
) -> None:
    servicer, stub = service
    servicer.plain = status
    error = await failure_of(stub.Status(generation_pb2.StatusRequest()))
    assert (type(error), error.message) == (kind, "said gRPC itself")


async def test_a_method_nobody_serves_is_refused(service: tuple[Service, Any]) -> None:
    _, stub = service
    assert isinstance(await failure_of(stub.ListModels(generation_pb2.ListModelsRequest())), errors.TandemError)


async def test_two_servers_do_not_share_a_port() -> None:
    first, second = rpc.make_server(), rpc.make_server()
    port = rpc.bind(first, "127.0.0.1", 0)
    await first.start()
    with pytest.raises(errors.ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
        rpc.bind(second, "127.0.0.1", port)
    await first.stop(0)
    await second.stop(0)


async def test_an_address_that_is_not_ours_is_a_config_error() -> None:
    server = rpc.make_server()
    with pytest.raises(errors.ConfigError, match=r"192\.0\.2\.1"):
        rpc.bind(server, "192.0.2.1", 0)
    await server.stop(0)


async def test_a_call_that_was_over_before_its_error_is_no_error_of_ours(caplog: pytest.LogCaptureFixture) -> None:
    """A deadline that passes while the handler fails: gRPC refuses the status in its own words."""

    class Over:
        def trailing_metadata(self) -> None:
            """None was set."""

        async def abort(self, *_: object) -> None:
            raise RuntimeError("too many operations")

    with caplog.at_level(logging.INFO), pytest.raises(asyncio.CancelledError):
        await rpc.abort_with(Over(), errors.DeadlineExceeded("late"))
    assert caplog.messages == []
