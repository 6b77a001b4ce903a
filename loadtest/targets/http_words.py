"""What an HTTP endpoint says of an error, and why it said nothing: in a person's words."""

from __future__ import annotations

import json
import os
import socket
import ssl
from typing import Any

import aiohttp

from loadtest.metrics import MAX_ERROR_CHARS, one_line


def said_by(body: bytes) -> str:
    """The message of an answer that is an error, if it has OpenAI's form, otherwise its beginning."""
    try:
        found: Any = json.loads(body)
        message = found["error"]["message"]
    except (ValueError, RecursionError, TypeError, KeyError):
        message = None
    return one_line(message if isinstance(message, str) else body.decode(errors="replace"))


def what_broke(error: Exception) -> str:
    """aiohttp's own words tell its settings, quote bytes, or are only the URL."""
    if isinstance(error, aiohttp.ClientConnectorError):
        return _of_a_connection(error.os_error)
    if isinstance(error, aiohttp.ClientResponseError) and not isinstance(error, aiohttp.TooManyRedirects):
        return "what it answers is not HTTP"
    if isinstance(error, TimeoutError):
        return "it did not answer in time"
    return str(error)[:MAX_ERROR_CHARS] or type(error).__name__


def _of_a_connection(error: OSError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is refused: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"it does not speak TLS ({error.reason or error.strerror}); is it http://?"
    if isinstance(error, socket.gaierror) or not error.errno:
        return error.strerror or str(error)
    return os.strerror(error.errno)
