"""What every request passes before the app: it gets an id, and strangers' pages are kept out."""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Sequence
from http import HTTPStatus

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router.doors.http.answers import ChatShape, CompletionShape
from router.doors.http.failures import error_object, response_to
from router.life.request_log import ID_HEADER, RequestLog, new_id
from tandem.errors import InvalidRequest

# How OpenAI's ids of answers begin, by path.
_PREFIXES = {"/v1/completions": CompletionShape.prefix, "/v1/chat/completions": ChatShape.prefix}
_ASKING = ("GET", "HEAD")
_CODE = "misdirected_request"


class RequestIds:
    """ASGI: gives each request its log entry, and each answer the header with its id, the client's own or ours.
    Whatever the app answers passes here.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        entry = RequestLog(f"{_PREFIXES.get(scope['path'], 'http')}-{new_id()}")
        scope["tandem.entry"] = entry

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                entry.status = message["status"]
                if entry.status < 400 and scope["method"] in _ASKING:
                    entry.level = logging.DEBUG  # probes and scrapes
                message = {**message, "headers": [*message["headers"], (ID_HEADER.encode(), entry.header_id.encode())]}
            await send(message)

        with entry:
            try:
                entry.take_client_id(Headers(scope=scope).getlist(ID_HEADER))
            except InvalidRequest as error:
                entry.failed(error)
                await response_to(error)(scope, receive, send_with_id)
                return
            await self._app(scope, receive, send_with_id)


class HostCheck:
    """ASGI: what comes over loopback must name this machine by an address, as localhost, or by one of `names`.

    A browser on this machine that was told that evil.example is 127.0.0.1 (DNS rebinding) takes that site's page and
    this door for one origin, and lets the page ask and read. What it cannot do is lie in `Host`.
    """

    def __init__(self, app: ASGIApp, names: Sequence[str]) -> None:
        self._app = app
        self._names = {name.lower() for name in names} | {"localhost"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host, server = Headers(scope=scope).get("host", ""), scope.get("server")
        listening = _address(str(server[0])) if server else None
        answer: ASGIApp = self._app
        if listening is not None and listening.is_loopback and not self._fits(_name(host)):
            message = f"this is not {host[:200]!r}; names that lead here are listed in router.http_names"
            status = HTTPStatus.MISDIRECTED_REQUEST
            answer = JSONResponse(error_object(message, status, _CODE), status, {"connection": "close"})
        await answer(scope, receive, send)

    def _fits(self, name: str) -> bool:
        """Without any name it is no browser."""
        return not name or name in self._names or name.endswith(".localhost") or _address(name) is not None


def _name(host: str) -> str:
    """Without the port, an IPv6 address's brackets, and the dot that an absolute name may end with."""
    if host.startswith("["):
        address, bracket, _ = host[1:].partition("]")
        return address if bracket else host
    return host.partition(":")[0].lower().removesuffix(".")


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None
