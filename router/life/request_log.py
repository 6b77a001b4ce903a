"""What the log says of a request: one line when it ends, in whatever way, by whichever door it came."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Protocol, Self

from tandem.errors import Cancelled, InternalError, InvalidRequest, TandemError
from tandem.process import logs
from tandem.types import Accepted, ChoiceFinished, Delta, Event

log = logging.getLogger(__name__)

# An answer's header: the client's own id of the request if it has given one by this name, or ours. In gRPC metadata.
ID_HEADER = "x-request-id"
MAX_ID_CHARS = 128
# Visible ASCII: nothing that ends a header or a line, or reads as two words of one.
_CLIENT_ID = re.compile(f"[!-~]{{1,{MAX_ID_CHARS}}}")


class PlacedJob(Protocol):
    @property
    def prefill_worker(self) -> str:
        """Its id; empty until placed."""

    @property
    def decode_worker(self) -> str:
        """As prefill_worker."""


def new_id() -> str:
    """128 random bits: nobody guesses it, and no two are the same, whatever ids clients give."""
    return secrets.token_hex(16)


class RequestLog:
    """One request, from its arrival to its line. Within its `with` block every line of the task is about it."""

    def __init__(self, request_id: str, level: int = logging.INFO) -> None:
        """request_id: ours. level: of the line."""
        self.request_id = request_id
        self.client_id = ""
        self.model = self.tag = ""
        self.prompt_tokens = 0
        self.level = level
        # The HTTP answer's; 0 at the other door.
        self.status = 0
        self._output_tokens = 0
        self._reasons: list[str] = []
        self._prefill: list[str] = []
        self._decode: list[str] = []
        self._error: TandemError | None = None
        self._began_s = time.monotonic()
        self._first_s: float | None = None

    @property
    def header_id(self) -> str:
        """What the answer's header says."""
        return self.client_id or self.request_id

    def take_client_id(self, given: Sequence[str | bytes]) -> None:
        """given: all values of the request's header. Raises InvalidRequest."""
        if not any(given):
            return
        value = given[0] if len(given) == 1 else ""
        if not isinstance(value, str) or not _CLIENT_ID.fullmatch(value):
            words = f"{ID_HEADER} must be one value of 1 to {MAX_ID_CHARS} visible ASCII characters"
            raise InvalidRequest(words, field=ID_HEADER)
        self.client_id = value

    def emitted(self, event: Event) -> None:
        """What its client is about to be given."""
        match event:
            case Accepted():
                self.prompt_tokens += event.prompt_tokens
            case Delta():
                self._first_s = self._first_s or time.monotonic()
                self._output_tokens += len(event.tokens)
            case ChoiceFinished():
                self._reasons.append(str(event.reason))

    def placed(self, jobs: Iterable[PlacedJob]) -> None:
        for job in jobs:
            self._prefill.append(job.prefill_worker)
            self._decode.append(job.decode_worker)

    def failed(self, error: TandemError) -> None:
        """The first one counts: others follow from it."""
        self._error = self._error or error

    def __enter__(self) -> Self:
        logs.about(self.request_id)
        return self

    def __exit__(self, _kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        match error:
            case None:
                pass
            case TandemError():
                self.failed(error)
            case asyncio.CancelledError():
                self.failed(Cancelled("its client left, or its deadline passed"))
            case _:
                self.failed(InternalError(type(error).__name__))
        log.log(self.level, "ended", extra={"request_id": self.request_id, "fields": self._fields()})

    def _fields(self) -> dict[str, object]:
        now_s = time.monotonic()
        fields = {
            "finish_reason": _joined(self._reasons),
            "error": self._error and self._error.code,
            "error_message": self._error and self._error.message,
            "status": self.status,
            "model": self.model,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self._output_tokens,
            "ttft_ms": self._first_s and round((self._first_s - self._began_s) * 1000, 1),
            "total_ms": round((now_s - self._began_s) * 1000, 1),
            "prefill_worker": _joined(self._prefill),
            "decode_worker": _joined(self._decode),
            "client_request_id": self.client_id,
            "tag": self.tag,
        }
        zeros = {"output_tokens", "total_ms"} if self.prompt_tokens else {"total_ms"}
        return {name: value for name, value in fields.items() if value or name in zeros}


def _joined(values: Iterable[str]) -> str:
    """Each once."""
    return ",".join(dict.fromkeys(filter(None, values)))
