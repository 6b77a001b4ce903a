"""Log lines: each has the request id that it is about, '-' if it is about none. Entry points call `configure`."""

from __future__ import annotations

import logging
import sys
from contextvars import ContextVar
from typing import TextIO

LINE = "%(asctime)s %(levelname)s %(name)s [%(request_id)s] %(message)s"

_current: ContextVar[str] = ContextVar("request_id", default="-")


def about(request_id: str) -> None:
    """What this task logs from now on is about the request, also where the code that logs knows of no requests."""
    _current.set(request_id)


def of_request(name: str, request_id: str) -> logging.LoggerAdapter[logging.Logger]:
    """The logger of a module, for lines about one request, whatever task they come from."""
    return logging.LoggerAdapter(logging.getLogger(name), {"request_id": request_id})


def configure(stream: TextIO | None = None) -> None:
    """From INFO upwards, to stderr unless a stream is given."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(logging.Formatter(LINE))
    handler.addFilter(_stamp)
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def _stamp(record: logging.LogRecord) -> bool:
    if not hasattr(record, "request_id"):
        record.request_id = _current.get()
    return True
