"""The body of a request: bounded bytes, then fields of the right types. What is wrong is named."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from router.doors.http.failures import HTTPMisuse
from router.doors.http.fields import brief
from tandem.errors import InvalidRequest

M = TypeVar("M", bound=BaseModel)

# A body must have arrived after this long.
READ_S = 30.0
# Bytes of a body that is too large which are read and dropped: a client that still writes does not read the answer.
LINGER_BYTES = 64 << 20
# By pydantic's name of the error: words, and which of its figures is the limit.
_LENGTHS = {"too_short": ("least", "min_length"), "too_long": ("most", "max_length")}
# JSON by its grammar, but not for this parser: its words for it, and what they mean.
_UNREAD = {
    "number out of range": "the body has a number of more than 4300 digits",
    "recursion limit exceeded": "the body is nested too deep",
    "unexpected end of hex escape": "the body has half of a surrogate pair, which is no character,",
    "lone leading surrogate in hex escape": "the body has half of a surrogate pair, which is no character,",
}
# Fields that may be several things: pydantic would say only why they are not the first.
_UNIONS = {"content": "a string or a list of text parts", "stop": "a string or a list of strings"}


async def read_body(request: Request, limit: int) -> bytes:
    """Raises HTTPMisuse."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # A page in a browser may send other types to any address unasked.
        raise HTTPMisuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "the content-type must be application/json")
    try:
        async with asyncio.timeout(READ_S):
            return await _read(request, limit)
    except TimeoutError:
        raise HTTPMisuse(HTTPStatus.REQUEST_TIMEOUT, f"the body did not arrive within {READ_S:g} s") from None
    except ClientDisconnect:  # nobody reads this, and nothing is wrong here that the log should tell of
        raise HTTPMisuse(HTTPStatus.BAD_REQUEST, "the client left before its body had arrived") from None


async def _read(request: Request, limit: int) -> bytes:
    chunks: list[bytes] = []
    declared = request.headers.get("content-length", "")
    size = int(declared) if declared.isdecimal() and len(declared) < 20 else 0
    if size <= LINGER_BYTES:
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > LINGER_BYTES:
                break
            if size <= limit:
                chunks.append(chunk)
    if size > limit:
        words = f"the body has more than {limit} bytes, the most this router takes (router.max_message_bytes)"
        raise HTTPMisuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, words)
    return b"".join(chunks)


def parse(kind: type[M], data: bytes) -> M:
    """Raises InvalidRequest naming the field."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise _explain(error) from None


def _explain(error: ValidationError) -> InvalidRequest:
    found = error.errors(include_url=False)
    # A union's members, of which pydantic tells one after the other why each does not fit: what is no string is a list.
    first = found[1] if found[0]["loc"][-1:] == ("str",) and isinstance(found[0]["input"], list) else found[0]
    if first["type"] == "json_invalid":
        # What the parser says, and ` at line 1 column 5`.
        told, at, place = first["msg"].removeprefix("Invalid JSON: ").partition(" at ")
        return InvalidRequest(_UNREAD.get(told, f"the body is not JSON: {told}") + at + place)
    if not first["loc"]:
        return InvalidRequest("the body must be a JSON object")
    field = _place(first["loc"])
    if first["type"] == "extra_forbidden":
        return InvalidRequest(f"{field} is not supported", field=field)
    if first["type"] in _LENGTHS:
        most, limit = _LENGTHS[first["type"]]
        count = first["ctx"][limit]
        return InvalidRequest(
            f"{field} must hold at {most} {count} {'entry' if count == 1 else 'entries'}", field=field
        )
    if first["type"] == "missing":
        return InvalidRequest(f"{field} is missing", field=field)
    if (words := _UNIONS.get(field.rpartition(".")[2])) is not None:
        return InvalidRequest(f"{field} must be {words}, not {brief(first['input'])}", field=field)
    wanted = first["msg"].removeprefix("Value error, ").removeprefix("Input ").removeprefix("should be ")
    return InvalidRequest(f"{field} must be {wanted}, not {brief(first['input'])}", field=field)


def _place(location: tuple[int | str, ...]) -> str:
    """`messages[0].content`, without pydantic's names for the members of a union."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "int", "float", "bool", "list", "dict"):
            path += f".{part}" if path else part
    return path[:200]
