"""Log lines: each has the request id that it is about, '-' if it is about none. Entry points call `configure`.

A record may bring `fields`, which follow its message as `key=value`, or are keys of their own in JSON.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, TextIO

from tandem.process.standard_streams import below, say_lost

LINE = "%(asctime)s %(levelname)s %(name)s [%(request_id)s] %(message)s"
# Packages whose lines --log-level is about: what others say below `info` concerns those who develop them.
OURS = ("tandem", "router", "prefill_worker", "decode_worker", "kv_transfer", "loadtest")
# Texts of clients and libraries end up in messages. What would end a line, or moves a cursor, is spelled out.
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}
_CONTROL |= {ord("\n"): "\\n", ord("\r"): "\\r", ord("\t"): "\\t", 0x2028: "\\u2028", 0x2029: "\\u2029"}
_PLAIN = re.compile(r"[^\s\"'=]+")

_current: ContextVar[str] = ContextVar("request_id", default="-")


def about(request_id: str) -> None:
    """What this task logs from now on is about the request, also where the code that logs knows of no requests."""
    _current.set(request_id)


def of_request(name: str, request_id: str) -> logging.LoggerAdapter[logging.Logger]:
    """The logger of a module, for lines about one request, whatever task they come from."""
    return logging.LoggerAdapter(logging.getLogger(name), {"request_id": request_id})


def configure(level: str = "info", format: str = "text", stream: TextIO | None = None) -> None:
    """From this level upwards, to stderr unless a stream is given. format: text or json."""
    target = stream or sys.stderr
    handler = logging.StreamHandler(target)
    handler.setFormatter(_JsonFormatter() if format == "json" else _TextFormatter(LINE))
    handler.addFilter(_stamp)
    if format == "json" and (ours := below(target)) is not None:
        ours.say_lost = lambda count: json.dumps({**_record("warning", __name__, say_lost(count)), "lost_lines": count})
    lowest: int = getattr(logging, level.upper())
    logging.basicConfig(handlers=[handler])
    logging.getLogger().setLevel(max(lowest, logging.INFO))
    for name in OURS:
        logging.getLogger(name).setLevel(lowest)


def in_json() -> bool:
    return any(isinstance(handler.formatter, _JsonFormatter) for handler in logging.getLogger().handlers)


def relayed(process: str, line: str) -> str:
    """One JSON line for a line of another process, which need not be JSON: libraries print what they like."""
    try:
        said = json.loads(line)
    except ValueError:
        said = None
    return json.dumps({**(said if isinstance(said, dict) else _record("info", "", line)), "process": process})


class _TextFormatter(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:
        fields: Mapping[str, object] = getattr(record, "fields", {})
        pairs = "".join(f" {name}={_word(value)}" for name, value in fields.items())
        return (super().formatMessage(record) + pairs).translate(_CONTROL)

    def formatException(self, ei: Any) -> str:
        """Indented: an error's own text may have lines that look like ours."""
        return "\n".join(f"    {line.translate(_CONTROL)}" for line in super().formatException(ei).split("\n"))


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        said = _record(record.levelname.lower(), record.name, record.getMessage(), record.created)
        request_id = getattr(record, "request_id", "-")
        said["request_id"] = None if request_id == "-" else request_id
        said |= getattr(record, "fields", {})
        if record.exc_info:
            said["exception"] = self.formatException(record.exc_info)
        return json.dumps(said, default=str)


def _record(level: str, logger: str, message: str, at_s: float | None = None) -> dict[str, Any]:
    time = (datetime.now(UTC) if at_s is None else datetime.fromtimestamp(at_s, UTC)).isoformat(timespec="milliseconds")
    return {"time": time, "level": level, "logger": logger, "message": message}


def _word(value: object) -> str:
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)


def _stamp(record: logging.LogRecord) -> bool:
    if not hasattr(record, "request_id"):
        record.request_id = _current.get()
    return True
