"""The HTTP door's sockets and server, and how long its clients may take."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from http import HTTPStatus
from typing import Any, ClassVar

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from router.doors.http.app import OpenAIDoor
from router.doors.http.chat_template import chat_template_of
from router.doors.http.failures import refusal
from router.doors.http.middleware import HostCheck, RequestIds
from router.life.request import STALL_S, Orchestrator
from router.life.request_log import ID_HEADER, new_id
from router.pool.registry import Registry
from router.tokenizer import Tokenizer
from tandem.addresses import check_listening, join_address
from tandem.config import TandemConfig
from tandem.errors import ConfigError
from tandem.process import descriptors

log = logging.getLogger(__name__)
_full = descriptors.RateLimitedWarning(log)

# A request line and its headers must have arrived after this long, and be no larger.
HEADERS_S = 10.0
HEADERS_BYTES = 64 << 10
# The kernel's buffer for a connection (it takes twice that): left alone it grows to megabytes for a client that does
# not read, and tokens are few.
SEND_BUFFER_BYTES = 128 << 10
# Connections beside those that have a live request: idle ones, and those whose request is still arriving.
SPARE_CONNECTIONS = 512
# A target in absolute form.
_ABSOLUTE = re.compile(rb"(?i:https?)://(?P<host>[^/?#]+)(?P<path>[^#]*)(#.*)?")
# How long a stopping door waits for answers that are on their way.
STOP_S = 1


@asynccontextmanager
async def open_door(
    config: TandemConfig,
    hosts: Sequence[str],
    orchestrator: Orchestrator,
    registry: Registry,
    tokenizer: Tokenizer | None,
) -> AsyncIterator[int]:
    """A serving door; yields its port. Raises ConfigError."""
    template = None if tokenizer is None else chat_template_of(tokenizer.loaded)
    sockets = _listen(hosts, config.router.http_port)
    door = OpenAIDoor(config.router, orchestrator, registry, tokenizer, template)
    app = RequestIds(HostCheck(door.app(), config.router.http_names))
    connections = descriptors.most_connections(config.router.max_live_requests + SPARE_CONNECTIONS)
    async with _serving(app, sockets, connections):
        yield sockets[0].getsockname()[1]


def _listen(hosts: Sequence[str], port: int) -> list[socket.socket]:
    """One port on all of these hosts; 0: any. Raises ConfigError."""
    sockets: list[socket.socket] = []
    for host in hosts:
        check_listening("router", host, port, "http_port")
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        try:
            sockets.append(socket.create_server(address[:2], family=family, backlog=descriptors.backlog()))
            # Its connections inherit both. asyncio would send small events at once only on sockets that name TCP.
            sockets[-1].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
            sockets[-1].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            for each in sockets:
                each.close()
            words = f"router.http_port: cannot listen on {join_address(host, port)}: {error.strerror}"
            raise ConfigError(words, field="router.http_port") from None
        port = sockets[0].getsockname()[1]
    return sockets


@asynccontextmanager
async def _serving(app: ASGIApp, sockets: list[socket.socket], max_connections: int) -> AsyncIterator[None]:
    """Serves the app on these sockets, and closes them in the end."""
    server = _Server(
        uvicorn.Config(
            app,
            http=_protocol(max_connections),
            backlog=descriptors.backlog(),
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=STOP_S,
        )
    )
    task = asyncio.create_task(server.serve(sockets))
    try:
        yield
    finally:
        server.should_exit = True
        await task
        for connection in list(server.server_state.connections):
            connection.transport.abort()


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the router's."""
        yield


def _protocol(limit: int) -> type[asyncio.Protocol]:
    class Limited(BoundedHTTP):
        max_connections = limit
        awaiting: ClassVar[dict[BoundedHTTP, None]] = {}

    return Limited


class _Parser(h11.Connection):
    """h11 bounds headers of which a part is missing: those that come whole would be as large as a read."""

    # Why it refused what came: set by a next_event that raises.
    refusal: tuple[HTTPStatus, str]

    def __init__(self) -> None:
        super().__init__(h11.SERVER, HEADERS_BYTES)

    def next_event(self) -> Any:
        """Raises h11.RemoteProtocolError."""
        within_body = self.their_state is h11.SEND_BODY
        waiting = len(self.trailing_data[0]) if self.their_state is h11.IDLE else 0
        try:
            event = super().next_event()
            if waiting > HEADERS_BYTES and waiting - len(self.trailing_data[0]) > HEADERS_BYTES:
                raise h11.RemoteProtocolError("headers too large", error_status_hint=431)
            if isinstance(event, h11.Request):
                event = _in_origin_form(event)
        except h11.RemoteProtocolError as error:
            self.refusal = _why(within_body, error)
            raise
        return event


def _in_origin_form(request: h11.Request) -> h11.Request:
    """A target may be a whole URL, as for a proxy; its host then counts, not that of the header (RFC 9112, 3.2.2).

    Raises h11.RemoteProtocolError for another version of HTTP: one digit more and the rules are others.
    """
    if not request.http_version.startswith(b"1."):
        raise h11.RemoteProtocolError("not HTTP/1", error_status_hint=505)
    found = _ABSOLUTE.fullmatch(request.target)
    if found is None:
        return request
    headers = [(b"host", found["host"]) if name == b"host" else (name, value) for name, value in request.headers]
    path = found["path"] if found["path"].startswith(b"/") else b"/" + found["path"]
    return h11.Request(method=request.method, target=path, headers=headers, http_version=request.http_version)


def _why(within_body: bool, error: h11.RemoteProtocolError) -> tuple[HTTPStatus, str]:
    """h11 hints at headers that are too large whatever the part is."""
    if within_body:
        return HTTPStatus.BAD_REQUEST, "the body does not come in HTTP/1.1 chunks that this server can read"
    if error.error_status_hint == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE:
        words = f"the request line and the headers have more than {HEADERS_BYTES} bytes"
        return HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, words
    if error.error_status_hint == HTTPStatus.HTTP_VERSION_NOT_SUPPORTED:
        return HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "this server speaks HTTP/1.1 only"
    return HTTPStatus.BAD_REQUEST, "what came is not an HTTP/1.1 request that this server can read"


class BoundedHTTP(H11Protocol):
    """uvicorn's HTTP/1.1, with bounds on clients that send too much, or send or take nothing.

    headers awaited ──they came──▶ answering ──answered──▶ idle ──bytes come──▶ headers awaited
    any of these ──bytes that are no HTTP──▶ refused: what still comes is dropped

    headers awaited, refused ──HEADERS_S──▶ aborted
    headers awaited ──the longest, and one more connection than there may be has come──▶ aborted
    any of these ──bytes for the client wait for STALL_S──▶ aborted
    """

    max_connections: int
    # A door's connections whose headers are awaited, longest first: strangers that only connect keep no client out.
    awaiting: ClassVar[dict[BoundedHTTP, None]]
    conn: _Parser

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.conn = _Parser()
        self._headers_due: asyncio.TimerHandle | None = None
        # What it still sends is dropped.
        self._refused = False
        self._stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.max_connections and not self._make_room():
            words = f"{self.max_connections} connections are open, the most this router takes"
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, words, [(b"retry-after", b"1")])
            self.transport.close()
            return
        # Not only much counts as stalled: a closed transport would wait for ever until its last bytes are taken.
        transport.set_write_buffer_limits(high=0)
        self._expect_headers()

    def _make_room(self) -> bool:
        _full.warn("%d HTTP connections are open, the most this router takes", self.max_connections)
        longest = next(iter(self.awaiting), None)
        if longest is None:
            return False
        longest._headers_arrived()
        longest.transport.abort()
        return True

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing() or self._refused:
            return
        if self._headers_due is None and not self._answering:
            self._expect_headers()  # of the connection's next request
        super().data_received(data)
        if self._answering and not self._refused:
            self._headers_arrived()

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _expect_headers(self) -> None:
        self._headers_due = self.loop.call_later(HEADERS_S, self.transport.abort)
        self.awaiting[self] = None

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP, or more of it than the parser takes. msg: uvicorn's own words."""
        if self._answering:  # to the handler, which may still read the body, its client has left
            self.cycle.disconnected = True
            self.cycle.waiting_for_100_continue = False
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # else an answer has begun, and none can follow it
            self._refuse(*self.conn.refusal)
        # Closed with bytes unread, a connection is reset, and a client that was still sending would not see the answer.
        try:
            self.transport.write_eof()
        except OSError:  # the client has reset the connection, and its transport has not heard of it yet
            self.transport.abort()
        self._refused = True
        self.flow.resume_reading()
        if self._headers_due is None:
            self._expect_headers()

    def _refuse(self, status: HTTPStatus, message: str, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        """The answer to a connection that gets no other."""
        body, request_id = refusal(status, message), f"http-{new_id()}"
        log.debug("refused: %d, %s", status, message, extra={"request_id": request_id})
        fields = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
            (ID_HEADER.encode(), request_id.encode()),
            *headers,
        ]
        events = (
            h11.Response(status_code=status, headers=fields, reason=status.phrase.encode()),
            h11.Data(data=body),
            h11.EndOfMessage(),
        )
        self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(STALL_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._taken()

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._headers_arrived()
        self._taken()

    def _headers_arrived(self) -> None:
        self.awaiting.pop(self, None)
        if self._headers_due is not None:
            self._headers_due.cancel()
            self._headers_due = None

    def _taken(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None
