"""Keeps pages of strangers out: a browser on this machine that was told that evil.example is 127.0.0.1 (DNS rebinding)
takes that site's page and this door for one origin, and lets the page ask and read. What it cannot do is lie in `Host`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from http import HTTPStatus

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from router.doors.http.failures import error_object

_CODE = "misdirected_request"


class HostCheck:
    """ASGI: what comes over loopback must name this machine by an address, as localhost, or by one of `names`."""

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
