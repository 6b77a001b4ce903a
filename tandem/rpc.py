"""gRPC as Tandem uses it: channel and server settings, and the one table of errors and their statuses."""

from __future__ import annotations

import asyncio
import inspect
import logging
import re
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, NoReturn

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from tandem import errors
from tandem.addresses import check_listening, join_address

log = logging.getLogger(__name__)

# Largest message anybody accepts by default; the KV service sets its own, larger one.
MAX_MESSAGE_BYTES = 4 << 20
# What every worker accepts, for its KV frames are as large: the largest request that a router may be configured to
# take (config: router.max_message_bytes), and 4 KiB for what it gains on its way.
MAX_WORKER_MESSAGE_BYTES = (1 << 24) + 4096
# A cut link raises no error by itself: both ends ping when nothing came for 2 s and give up after 3 s more. gRPC takes
# the keepalive timeout for what the kernel sees (packets without ACK), and another, of 60 s, for a ping without answer.
KEEPALIVE_MS, KEEPALIVE_TIMEOUT_MS = 2000, 3000
# Calls that have arrived and no handler has taken yet. gRPC begins to cancel some at random from 1000 on, and its
# client cannot tell that from a server that went away; what Tandem serves at once is bounded by its own queues, whose
# refusals say so. Four times the largest router.max_live_requests, for aborts may be waiting as well.
MAX_UNTAKEN_CALLS = 1 << 16
# A connection must have begun to speak HTTP/2 after this long: until then it keeps a client out.
HANDSHAKE_TIMEOUT_MS = 5000
# Dialling a host that does not answer ends after this long, not after gRPC's 20 s: the next try may find it back.
DIAL_TIMEOUT_MS = 2000


class Status(NamedTuple):
    """What an error is called outside: on a gRPC call, and at the HTTP door."""

    grpc: grpc.StatusCode
    http: int


# The table: error class (nearest base counts) → status.
STATUS: dict[type[errors.TandemError], Status] = {
    errors.InvalidRequest: Status(grpc.StatusCode.INVALID_ARGUMENT, 400),
    errors.ModelNotFound: Status(grpc.StatusCode.NOT_FOUND, 404),
    errors.Overloaded: Status(grpc.StatusCode.RESOURCE_EXHAUSTED, 429),
    errors.DeadlineExceeded: Status(grpc.StatusCode.DEADLINE_EXCEEDED, 504),
    # 499, nginx's own: nobody is there to read it, but logs and metrics have a number.
    errors.Cancelled: Status(grpc.StatusCode.CANCELLED, 499),
    errors.Unavailable: Status(grpc.StatusCode.UNAVAILABLE, 503),
    errors.TransferFailed: Status(grpc.StatusCode.DATA_LOSS, 502),
    errors.Refused: Status(grpc.StatusCode.FAILED_PRECONDITION, 500),
    errors.ConfigError: Status(grpc.StatusCode.INVALID_ARGUMENT, 500),
    errors.ModelRefused: Status(grpc.StatusCode.FAILED_PRECONDITION, 500),
    errors.TandemError: Status(grpc.StatusCode.INTERNAL, 500),
}
# What a status means when no Tandem process attached a code: gRPC itself or a proxy spoke.
_PLAIN: dict[grpc.StatusCode, type[errors.TandemError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequest,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.Overloaded,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    grpc.StatusCode.CANCELLED: errors.Cancelled,
    grpc.StatusCode.UNAVAILABLE: errors.Unavailable,
    grpc.StatusCode.UNIMPLEMENTED: errors.Refused,
}
_COUNT = re.compile("[0-9]{1,9}")
_COUNTED_FROM_KEY = "tandem-counted-from"
_CODE_KEY, _FIELD_KEY, _RETRY_KEY = "tandem-code", "tandem-field", "tandem-retry-after-ms"


# Largest frame of HTTP/2: a larger message comes in several, and is copied in as many pieces. gRPC's default, 16 KiB,
# costs KV about a tenth of its rate.
_FRAME_BYTES = 1 << 20


def client_options(max_message_bytes: int = MAX_MESSAGE_BYTES) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.http2.max_frame_size", _FRAME_BYTES),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.min_reconnect_backoff_ms", DIAL_TIMEOUT_MS),
        # Redial a restarted peer within a second, not after gRPC's default of up to 20 s.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
        # Each channel dials for itself: a dead worker's socket is never shared with its successor's channel.
        ("grpc.use_local_subchannel_pool", 1),
    ]


def server_options(max_message_bytes: int, most_untaken: int) -> list[tuple[str, int]]:
    from tandem.process.descriptors import most_connections  # of Unix alone, as servers are; clients run elsewhere too

    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.http2.max_frame_size", _FRAME_BYTES),
        # Allow the clients' pings above, on idle connections too; the default would answer "too many pings".
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 1000),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.server.max_pending_requests", most_untaken),
        ("grpc.server.max_pending_requests_hard_limit", most_untaken),
        ("grpc.max_allowed_incoming_connections", most_connections()),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_TIMEOUT_MS),
        # A second process on the same port must fail, not share it.
        ("grpc.so_reuseport", 0),
    ]


def make_channel(address: str, max_message_bytes: int = MAX_MESSAGE_BYTES) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(address, options=client_options(max_message_bytes))


def make_server(max_message_bytes: int = MAX_MESSAGE_BYTES, most_untaken: int = MAX_UNTAKEN_CALLS) -> grpc.aio.Server:
    """A server whose handlers may raise TandemError. most_untaken: calls that wait for the event loop to see them."""
    return grpc.aio.server(interceptors=[ErrorInterceptor()], options=server_options(max_message_bytes, most_untaken))


def bind(server: grpc.aio.Server, host: str, port: int, section: str = "router") -> int:
    """Binds and returns the port. Raises ConfigError, naming the configuration section's key, when it cannot."""
    check_listening(section, host, port)
    address = join_address(host, port)
    try:
        bound = int(server.add_insecure_port(address))
    except RuntimeError:
        bound = 0
    if bound == 0:
        raise errors.ConfigError(
            f"{section}.port: cannot listen on {address}; it was taken this moment", field=f"{section}.port"
        )
    return bound


async def add_health(server: grpc.aio.Server, names: tuple[str, ...]) -> health.aio.HealthServicer:  # type: ignore[name-defined]
    """The standard health service, saying that all of these services serve, and reflection over them."""
    service = health.aio.HealthServicer()  # type: ignore[attr-defined]
    for name in ("", *names):
        await service.set(name, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(service, server)
    reflection.enable_server_reflection((*names, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    return service


async def read(stream: Any) -> Any:
    """The next message of a call or of a handler's context; None at the end."""
    message = await stream.read()
    return None if message is grpc.aio.EOF else message  # type: ignore[attr-defined]


async def say_counted_from(context: Any, heartbeat: int) -> None:
    """Tells the caller which heartbeat is the first to count its request; not after a message."""
    await context.send_initial_metadata(((_COUNTED_FROM_KEY, str(heartbeat)),))


async def counted_from(call: Any) -> int:
    """What `say_counted_from` told; 0 when the call ended before."""
    said = dict(await call.initial_metadata() or ()).get(_COUNTED_FROM_KEY, "")
    return int(said) if _COUNT.fullmatch(said) else 0


async def ended(call: Any) -> errors.TandemError:
    """Why a stream that was read to its end has ended, as a TandemError."""
    trailing = await call.trailing_metadata()
    details = await call.details()
    return _error_of(await call.code(), details, trailing)


def status_of(error: errors.TandemError) -> Status:
    return next(STATUS[base] for base in type(error).__mro__ if base in STATUS)


def error_from_rpc(error: grpc.RpcError) -> errors.TandemError:
    """The TandemError behind a failed call; statuses that no Tandem process sent are translated by meaning."""
    call: Any = error
    return _error_of(call.code(), call.details(), call.trailing_metadata())


def said_by_tandem(error: grpc.RpcError) -> bool:
    """Whether a Tandem process, and not gRPC itself or a proxy, gave the status (see abort_with)."""
    call: Any = error
    return any(str(key) == _CODE_KEY for key, _ in call.trailing_metadata() or ())


def _error_of(code: grpc.StatusCode, details: str | None, trailing: Any) -> errors.TandemError:
    metadata = {str(key): str(value) for key, value in (trailing or ())}
    message = details or code.name.lower().replace("_", " ")
    if _CODE_KEY not in metadata:
        return _PLAIN.get(code, errors.InternalError)(message)
    retry = metadata.get(_RETRY_KEY, "")
    return errors.from_code(
        metadata[_CODE_KEY],
        message,
        field=metadata.get(_FIELD_KEY),
        # What a peer wrote: anything but a count of milliseconds is no hint.
        retry_after_ms=int(retry) if _COUNT.fullmatch(retry) else None,
    )


def _metadata_of(error: errors.TandemError) -> tuple[tuple[str, str], ...]:
    pairs = ((_CODE_KEY, error.code), (_FIELD_KEY, error.field), (_RETRY_KEY, error.retry_after_ms))
    return tuple((key, str(value)) for key, value in pairs if value is not None)


async def abort_with(context: Any, error: Exception) -> NoReturn:
    """Ends a call with an error's status. Anything but a TandemError is a bug: logged here, not told to the peer."""
    if not isinstance(error, errors.TandemError):
        log.error("unexpected error in a call", exc_info=error)
        error = errors.InternalError("internal error; the server's log has the details")
    try:
        metadata = (*_metadata_of(error), *(context.trailing_metadata() or ()))
        await context.abort(status_of(error).grpc, error.message, metadata)
    except grpc.aio.AbortError:
        raise
    except Exception as failure:  # gRPC's own, private kinds: the call ended while the handler did, and nobody listens
        log.debug("a call was over before its error could be told: %s", failure)
        raise asyncio.CancelledError from None
    raise AssertionError("context.abort returned")


class ErrorInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc,type-arg,unused-ignore]
    """Lets every handler raise TandemError; the peer gets its status, code, field and retry hint.

    Every handler is a coroutine: a streaming one calls `context.write` and is not a generator, because a generator
    that gRPC drops at a yield runs its cleanup only when it is collected, and blocks would stay held until then.
    """

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        kind = _KINDS[bool(handler.request_streaming), bool(handler.response_streaming)]
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(_guard(getattr(handler, kind)), handler.request_deserializer, handler.response_serializer)


_KINDS = {
    (False, False): "unary_unary",
    (False, True): "unary_stream",
    (True, False): "stream_unary",
    (True, True): "stream_stream",
}


def _guard(behavior: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    if not inspect.iscoroutinefunction(behavior):
        return behavior  # a library's handler (health, reflection)

    async def guarded(request: Any, context: Any) -> Any:
        try:
            return await behavior(request, context)
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except Exception as error:
            return await abort_with(context, error)

    return guarded
