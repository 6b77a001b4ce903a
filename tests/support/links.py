"""TCP links with faults: one that falls silent, and one that flips bits of the KV frames that cross it."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable

# Of a client, before its first HTTP/2 frame.
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
# Given a KV frame's kind and its length in bytes: which bit is to be flipped, if any.
Flip = Callable[[str, int], int | None]
_KIND = re.compile(rb"TKVF.{9}\xa4kind[\xa0-\xbf]([a-z]+)", re.DOTALL)


class Link:
    """A TCP relay to one address, in a thread of its own, that can fall silent without closing anything."""

    def __init__(self) -> None:
        self.target = ""
        self._loop = asyncio.new_event_loop()
        self._whole = asyncio.Event()
        self._whole.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        server = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._relay, "127.0.0.1", 0), self._loop).result(
            5
        )
        self.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._server = server

    def cut(self) -> None:
        self._loop.call_soon_threadsafe(self._whole.clear)

    def mend(self) -> None:
        self._loop.call_soon_threadsafe(self._whole.set)

    def close(self) -> None:
        async def end() -> None:
            self._server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    def changer(self, forth: bool) -> Callable[[bytes], bytes]:
        """What becomes of the bytes that go one way over one connection; forth: to the target."""
        return lambda data: data

    async def _relay(self, near: asyncio.StreamReader, near_out: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._whole.wait()
            host, _, port = self.target.rpartition(":")
            far, far_out = await asyncio.open_connection(host, int(port))
            try:
                await asyncio.gather(
                    self._pump(near, far_out, self.changer(True)), self._pump(far, near_out, self.changer(False))
                )
            finally:
                far_out.close()
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            near_out.close()
            self._tasks.discard(task)

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, change: Callable[[bytes], bytes]
    ) -> None:
        while data := await source.read(1 << 16):
            await self._whole.wait()
            sink.write(change(data))
            await sink.drain()
        raise ConnectionResetError


class FlippingLink(Link):
    """Flips bits inside of KV frames, and nowhere else: HTTP/2 and gRPC around them stay as they are."""

    def __init__(self) -> None:
        self.flip: Flip = lambda kind, size: None
        # (kind, bit) of those that were flipped.
        self.flipped: list[tuple[str, int]] = []
        super().__init__()

    def flip_next(self, wanted: str, bit: int) -> None:
        """In the next frame of that kind, once. A bit below 0 counts from the frame's end."""
        self.flipped.clear()

        def once(kind: str, size: int) -> int | None:
            return bit % (size * 8) if kind == wanted and not self.flipped else None

        self.flip = once

    def changer(self, forth: bool) -> Callable[[bytes], bytes]:
        """See Link."""
        return _Connection(len(PREFACE) if forth else 0, self._messages).pass_on

    def _messages(self) -> _Messages:
        return _Messages(self._choose, self.flipped.append)

    def _choose(self, kind: str, size: int) -> int | None:
        return self.flip(kind, size)


class _Connection:
    """One way of an HTTP/2 connection, frame by frame."""

    def __init__(self, preface: int, messages: Callable[[], _Messages]) -> None:
        self._messages = messages
        # What comes before the first frame.
        self._preface = preface
        # Not yet a whole frame.
        self._rest = bytearray()
        self._streams: dict[int, _Messages] = {}

    def pass_on(self, data: bytes) -> bytes:
        passed = bytearray(data[: self._preface])
        self._preface -= len(passed)
        self._rest += data[len(passed) :]
        while (size := 9 + int.from_bytes(self._rest[:3], "big")) <= len(self._rest):
            frame, self._rest = self._rest[:size], self._rest[size:]
            kind, stream = frame[3], int.from_bytes(frame[5:9], "big")
            if kind == 0:  # DATA
                messages = self._streams.setdefault(stream, self._messages())
                passed += frame[:9] + messages.pass_on(frame[9:])
            else:
                passed += frame
        return bytes(passed)


class _Messages:
    """The gRPC messages of one stream, one way."""

    def __init__(self, choose: Flip, note: Callable[[tuple[str, int]], None]) -> None:
        self._choose = choose
        self._note = note
        # Compressed or not 1 | length 4
        self._prefix = bytearray()
        self._left = self._offset = 0
        self._kind = ""
        self._bit: int | None = None

    def pass_on(self, data: bytearray) -> bytearray:
        at = 0
        while at < len(data):
            at += self._within(data, at) if self._left else self._begin(data, at)
        return data

    def _begin(self, data: bytearray, at: int) -> int:
        """A frame whose beginning HTTP/2 cut is let pass: nothing says of what kind it is."""
        part = data[at : at + 5 - len(self._prefix)]
        self._prefix += part
        if len(self._prefix) == 5:
            self._left, self._offset = int.from_bytes(self._prefix[1:], "big"), 0
            self._prefix.clear()
            found = _KIND.match(data, at + len(part))
            self._kind = found[1].decode() if found else ""
            self._bit = self._choose(self._kind, self._left) if found else None
        return len(part)

    def _within(self, data: bytearray, at: int) -> int:
        step = min(self._left, len(data) - at)
        if self._bit is not None and self._offset <= self._bit // 8 < self._offset + step:
            data[at + self._bit // 8 - self._offset] ^= 1 << self._bit % 8
            self._note((self._kind, self._bit))
        self._left -= step
        self._offset += step
        return step
