"""From the one token stream of a decode worker to the inbox of each attempt."""

from __future__ import annotations

import asyncio
import secrets
from typing import Any, Protocol

from router.pool.pace import DecodePace
from tandem import errors, rpc
from tandem.v1 import worker_pb2

# Requests of a step that are sorted in one pass of the event loop, 6 µs each. With 16, a router that is short of time
# is behind its workers by a second.
MOST_IN_A_PASS = 64


class Subscriber(Protocol):
    """An attempt whose tokens the worker streams."""

    def put(self, message: worker_pb2.RequestTokens) -> None:
        """What one step brought for it."""

    def reported_end(self) -> None:
        """Called before the message in which the worker says that it is done."""


class TokenSubscription:
    """The token stream from one decode worker to this router, and the attempts that it is for."""

    def __init__(self) -> None:
        # Fresh for every connection and not guessable: tokens of a former one can never arrive here.
        self.id = secrets.token_hex(16)
        self._subscribers: dict[tuple[str, int], Subscriber] = {}
        # Those whose answers have begun to be decoded and go on.
        self._decoding: set[tuple[str, int]] = set()
        self.pace = DecodePace()
        self._call: Any = None

    async def open(self, call: Any, timeout_s: float) -> None:
        """call: Subscribe, with this id. Returns when the worker has accepted it. Raises grpc.RpcError or
        TimeoutError.
        """
        self._call = call
        async with asyncio.timeout(timeout_s):
            await call.wait_for_connection()

    @property
    def is_open(self) -> bool:
        return self._call is not None and not self._call.done()

    @property
    def placed(self) -> int:
        """Answers that it is for."""
        return len(self._subscribers)

    @property
    def decoding(self) -> int:
        return len(self._decoding)

    def register(self, request_id: str, attempt: int, subscriber: Subscriber) -> None:
        self._subscribers[request_id, attempt] = subscriber

    def forget(self, request_id: str, attempt: int) -> None:
        self._subscribers.pop((request_id, attempt), None)
        self._decoding.discard((request_id, attempt))

    async def pump(self) -> None:
        """Reads until the stream ends, which raises Unavailable or grpc.RpcError."""
        while (batch := await rpc.read(self._call)) is not None:
            for number, message in enumerate(batch.requests, 1):
                self._dispatch(message)
                if number % MOST_IN_A_PASS == 0:  # lost just now, a worker's last words are too
                    await asyncio.sleep(0)
            self.pace.stepped(sum(len(message.tokens) for message in batch.requests), len(self._decoding))
        raise errors.Unavailable("it ended its token stream")

    def _dispatch(self, message: worker_pb2.RequestTokens) -> None:
        """Tokens of unknown requests and of stale attempts go nowhere: their choice has ended."""
        key = message.request_id, message.attempt
        subscriber = self._subscribers.get(key)
        if subscriber is None:
            return
        if message.finish_reason or message.HasField("failure"):
            self._decoding.discard(key)
            subscriber.reported_end()
        else:
            self._decoding.add(key)
        subscriber.put(message)
