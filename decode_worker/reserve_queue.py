"""Who waits for blocks, in order of arrival."""

from __future__ import annotations

import asyncio
from collections import deque

from tandem.engine.block_pool import BlockTable
from tandem.errors import Overloaded
from tandem.types import EngineRequest, Role
from tandem.worker.host import WorkerHost


class ReserveQueue:
    """First come, first served: a large request is not starved by small ones that would fit. Bounded."""

    def __init__(self, host: WorkerHost) -> None:
        self._host = host
        self._limit = host.config.worker.max_waiting_reservations
        self._waiting: deque[asyncio.Event] = deque()
        host.when_blocks_free(self._wake_first)

    def __len__(self) -> int:
        return len(self._waiting)

    async def acquire(self, request: EngineRequest) -> BlockTable:
        """Blocks for the request, as soon as its turn comes and the pool has them.

        Raises InvalidRequest when the pool could never hold it, Overloaded when too many wait. Being cancelled
        gives up the place.
        """
        if not self._waiting and (table := self._reserve(request)) is not None:
            return table
        if len(self._waiting) >= self._limit:
            raise Overloaded(f"{self._limit} requests wait for KV blocks already", retry_after_ms=1000)
        turn = asyncio.Event()
        self._waiting.append(turn)
        try:
            while self._waiting[0] is not turn or (table := self._reserve(request)) is None:
                await turn.wait()
                turn.clear()
            return table
        finally:
            self._waiting.remove(turn)
            self._wake_first()

    def _reserve(self, request: EngineRequest) -> BlockTable | None:
        # A worker that also prefills may be asked to compute this very prompt.
        return self._host.engine.reserve(request, prefill_here=Role.PREFILL in self._host.roles)

    def _wake_first(self) -> None:
        if self._waiting:
            self._waiting[0].set()
