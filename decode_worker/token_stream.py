"""The one stream of tokens from this worker to each router."""

from __future__ import annotations

import asyncio

from tandem.v1 import worker_pb2

# Steps of requests in one message: with 20 log probabilities on each token still far below the 4 MiB that a router
# takes, however long it did not read. A larger message would end the stream, and every request on it.
MAX_BATCH = 2048


class TokenStream:
    """What waits to be sent to one router.

    Bounded by nature: a live request has at most max_tokens tokens, and it ends with its subscription. A router that
    reads slowly gets several steps in one message.
    """

    def __init__(self) -> None:
        self._closed = False
        self._pending: list[worker_pb2.RequestTokens] = []
        self._ready = asyncio.Event()

    def put(self, tokens: worker_pb2.RequestTokens) -> None:
        self._pending.append(tokens)
        self._ready.set()

    def close(self) -> None:
        """No tokens come any more; those that wait are sent."""
        self._closed = True
        self._ready.set()

    async def next_batch(self) -> worker_pb2.TokenBatch | None:
        """Waits for tokens and returns all there are, MAX_BATCH at most; the engine delivers a step's in one go.

        None: closed.
        """
        await self._ready.wait()
        if self._closed and not self._pending:
            return None
        pending, self._pending = self._pending[:MAX_BATCH], self._pending[MAX_BATCH:]
        if not self._pending and not self._closed:
            self._ready.clear()
        return worker_pb2.TokenBatch(requests=pending)
