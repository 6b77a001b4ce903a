"""The id of a request, in every answer's header and in the log: the client's own, or ours."""

from __future__ import annotations

import logging

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router.doors.http.answers import ChatShape, CompletionShape
from router.doors.http.failures import response_to
from router.life.request_log import ID_HEADER, RequestLog, new_id
from tandem.errors import InvalidRequest

# By path: how OpenAI's ids of answers begin.
_PREFIXES = {"/v1/completions": CompletionShape.prefix, "/v1/chat/completions": ChatShape.prefix}
_ASKING = ("GET", "HEAD")


class RequestIds:
    """ASGI: gives each request its log entry, and each answer the header. Whatever the app answers passes here."""

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
