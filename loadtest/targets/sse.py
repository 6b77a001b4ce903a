"""Server-sent events, as far as OpenAI endpoints use them: data lines, comments, and a blank line after each event."""

from __future__ import annotations

from collections.abc import Iterator

# An event of one token is some hundred bytes; with log probabilities some thousand.
MAX_EVENT_BYTES = 1 << 20


class Malformed(Exception):
    """What came is no such stream. str(error) is for a person."""


class EventSplitter:
    """Bytes in, as the network cuts them; the data of every whole event out."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Raises Malformed for an event above MAX_EVENT_BYTES."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in (line.removesuffix(b"\r") for line in lines):
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                data, self._data = b"\n".join(self._data), []
                yield data
        if len(self._rest) + sum(map(len, self._data)) > MAX_EVENT_BYTES:
            raise Malformed(f"an event is larger than {MAX_EVENT_BYTES} bytes")
