"""Errors at the HTTP door: the status of the one table (tandem/rpc.py), in the shape that OpenAI's clients read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import Scope

from router.life.request_log import RequestLog
from tandem import errors, rpc

# What the messages of these say is about the request or about all of the service. Those of other errors may name
# workers and their addresses, and stay in the log.
_TOLD = frozenset(
    {errors.InvalidRequest, errors.ModelNotFound, errors.Overloaded, errors.DeadlineExceeded, errors.Unavailable}
)
_INSTEAD: dict[type[errors.TandemError], str] = {
    errors.OutOfMemory: "a worker's device has no memory left for the request",
    errors.WorkerLost: "a worker was lost while it held the request; send it again",
    errors.TransferFailed: "the prompt's KV cache did not reach its decode worker; send the request again",
    errors.Cancelled: "the request was cancelled",
}
_INTERNAL = "internal error; the router's log has the details"


def entry_of(scope: Scope) -> RequestLog:
    """What the log will say of this request (middleware.py)."""
    entry: RequestLog = scope["tandem.entry"]
    return entry


def error_object(message: str, status: int, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """OpenAI's: what a response with this status, or the last event of a stream that breaks off, says."""
    kind = {429: "rate_limit_error"}.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def object_of(error: errors.TandemError) -> dict[str, Any]:
    message = error.message if type(error) in _TOLD else _INSTEAD.get(type(error), _INTERNAL)
    return error_object(message, rpc.status_of(error).http, error.code, error.field)


def response_to(error: errors.TandemError) -> Response:
    return JSONResponse(object_of(error), rpc.status_of(error).http, retry_headers(error))


def retry_headers(error: errors.TandemError) -> dict[str, str]:
    """Whole seconds by the standard; OpenAI's clients prefer their own, in milliseconds."""
    if error.retry_after_ms is None:
        return {}
    return {"retry-after": str(math.ceil(error.retry_after_ms / 1000)), "retry-after-ms": str(error.retry_after_ms)}


def refusal(status: HTTPStatus, message: str) -> bytes:
    """The body of an answer that no handler gives."""
    return json.dumps(error_object(message, status, _code(status))).encode()


def _code(status: int) -> str:
    return HTTPStatus(status).phrase.lower().replace(" ", "_")


@contextmanager
def named_as_sent(names: Mapping[str, str]) -> Iterator[None]:
    """Inside, what is wrong with a field is told by the name that the client used. names: ours → the client's."""
    try:
        yield
    except errors.InvalidRequest as error:
        # What a message quotes, it ends with; that is the client's already.
        ours = re.split(r"(?<!\w)['\"]", error.message, maxsplit=1)[0]
        # Where a message names a field: at its start, or before the field's value.
        theirs = re.sub(r"^\w+|\b\w+(?= \(|=)", lambda found: names.get(found[0], found[0]), ours)
        field = names.get(error.field or "", error.field)
        if (theirs, field) == (ours, error.field):
            raise
        raise errors.InvalidRequest(theirs + error.message[len(ours) :], field=field) from None


class HTTPMisuse(HTTPException):
    """What is wrong with the HTTP around a request. Nothing more of it is read: the connection ends."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(status, message, {"connection": "close"})


async def on_tandem_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, errors.TandemError)
    entry_of(request.scope).failed(error)
    return response_to(error)


async def on_http_error(request: Request, error: Exception) -> Response:
    """Errors of the framework (no such path, wrong method) and HTTPMisuse."""
    assert isinstance(error, HTTPException)
    message = error.detail
    if error.status_code == HTTPStatus.NOT_FOUND:
        message = f"there is nothing at {request.method} {request.url.path[:200]}"
    elif error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = (error.headers or {}).get("Allow", "another method")
        message = f"{request.url.path[:200]} takes {allowed}, not {request.method}"
    content = error_object(message, error.status_code, _code(error.status_code))
    return JSONResponse(content, error.status_code, error.headers)


async def on_bug(_request: Request, _error: Exception) -> Response:
    """The server logs it."""
    return JSONResponse(error_object(_INTERNAL, 500, errors.InternalError.code), 500)


def stream_event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"
