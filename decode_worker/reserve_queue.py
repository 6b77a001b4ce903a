"""Who waits for blocks, in order of arrival."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

from decode_worker.order import Order
from tandem.engine.block_pool import BlockTable
from tandem.errors import Overloaded, TandemError
from tandem.worker.host import WorkerHost


@dataclass(eq=False)
class _Turn:
    order: Order
    # Set when it may be this one's turn, or when it was turned away.
    called: asyncio.Event = field(default_factory=asyncio.Event)
    turned_away: TandemError | None = None


class ReserveQueue:
    """First come, first served: a large request is not starved by small ones that would fit. Bounded."""

    def __init__(self, host: WorkerHost) -> None:
        self._host = host
        self._limit = host.config.worker.max_waiting_reservations
        self._waiting: deque[_Turn] = deque()
        host.when_blocks_free(self._call_first)

    def __len__(self) -> int:
        return len(self._waiting)

    async def acquire(self, order: Order) -> BlockTable:
        """Blocks for the order, as soon as its turn comes and the pool has them.

        Raises InvalidRequest when the pool could never hold it, Overloaded when too many wait, and what it is turned
        away with. Being cancelled gives up the place.
        """
        if not self._waiting and (table := self._reserve(order)) is not None:
            return table
        if len(self._waiting) >= self._limit:
            raise Overloaded(f"{self._limit} requests wait for KV blocks already", retry_after_ms=1000)
        turn = _Turn(order)
        self._waiting.append(turn)
        try:
            while self._waiting[0] is not turn or (table := self._reserve(order)) is None:
                await turn.called.wait()
                turn.called.clear()
                if turn.turned_away is not None:
                    raise turn.turned_away
            return table
        finally:
            self._waiting.remove(turn)
            self._call_first()

    def newest_attempt(self, request_id: str) -> int | None:
        """Of those that wait; None when none does."""
        return max((turn.order.request.attempt for turn in self._of(request_id)), default=None)

    def turn_away(self, request_id: str, attempt: int, error: TandemError) -> None:
        """Ends the waiting of a request's attempts up to this one: their `acquire` raises the error."""
        for turn in self._of(request_id):
            if turn.order.request.attempt <= attempt:
                turn.turned_away = error
                turn.called.set()

    def _of(self, request_id: str) -> list[_Turn]:
        return [turn for turn in self._waiting if turn.order.request.request_id == request_id]

    def _reserve(self, order: Order) -> BlockTable | None:
        return self._host.engine.reserve(order.request, order.local, order.block_names)

    def _call_first(self) -> None:
        if self._waiting:
            self._waiting[0].called.set()
