"""The one stream of tokens from this worker to each router."""

from __future__ import annotations

import asyncio

from tandem.v1 import worker_pb2


class Subscription:
    """What waits to be sent to one router.

    Bounded by nature: a live request has at most max_tokens tokens, and it ends with its subscription. A router that
    reads slowly gets several steps in one message.
    """

    def __init__(self) -> None:
        self._pending: list[worker_pb2.RequestTokens] = []
        self._ready = asyncio.Event()

    def put(self, tokens: worker_pb2.RequestTokens) -> None:
        self._pending.append(tokens)
        self._ready.set()

    async def next_batch(self) -> worker_pb2.TokenBatch:
        """Waits for tokens and returns all there are; the engine delivers a step's tokens in one go."""
        await self._ready.wait()
        self._ready.clear()
        pending, self._pending = self._pending, []
        return worker_pb2.TokenBatch(requests=pending)
