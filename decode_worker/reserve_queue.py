"""Who waits for blocks, in order of arrival; and which attempts were aborted before they had any."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from dataclasses import dataclass, field

from tandem.engine.block_pool import BlockTable
from tandem.errors import Overloaded, TandemError, Unavailable
from tandem.types import EngineRequest
from tandem.worker.host import WorkerHost
from tandem.worker.reservation import ReserveOrder

# Far more than the Reserve calls that can be on their way at once.
MAX_ABORTED = 4096


@dataclass(eq=False)
class _Waiter:
    order: ReserveOrder
    # Set when it may be this one's turn, or when it was rejected.
    woken: asyncio.Event = field(default_factory=asyncio.Event)
    rejected: TandemError | None = None


class ReserveQueue:
    """First come, first served: a large request is not starved by small ones that would fit. Bounded."""

    def __init__(self, host: WorkerHost) -> None:
        self._engine = host.engine
        self._limit = host.config.worker.max_waiting_reservations
        self._waiting: deque[_Waiter] = deque()
        host.when_blocks_free(self._wake_first)

    def __len__(self) -> int:
        return len(self._waiting)

    async def acquire(self, order: ReserveOrder) -> BlockTable:
        """Blocks for the order, as soon as its turn comes and the pool has them.

        Raises InvalidRequest when the pool could never hold it, Overloaded when too many wait, and what it is rejected
        with. Being cancelled gives up the place.
        """
        if not self._waiting and (table := self._reserve(order)) is not None:
            return table
        if len(self._waiting) >= self._limit:
            raise Overloaded(f"{self._limit} requests wait for KV blocks already", retry_after_ms=1000)
        waiter = _Waiter(order)
        self._waiting.append(waiter)
        try:
            while self._waiting[0] is not waiter or (table := self._reserve(order)) is None:
                await waiter.woken.wait()
                waiter.woken.clear()
                if waiter.rejected is not None:
                    raise waiter.rejected
            return table
        finally:
            self._waiting.remove(waiter)
            self._wake_first()

    def newest_attempt(self, request_id: str) -> int | None:
        """The newest attempt of the request that waits; None when none does."""
        return max((waiter.order.request.attempt for waiter in self._of(request_id)), default=None)

    def reject(self, request_id: str, attempt: int, error: TandemError) -> None:
        """Ends the waiting of a request's attempts up to this one: their `acquire` raises the error."""
        for waiter in self._of(request_id):
            if waiter.order.request.attempt <= attempt:
                waiter.rejected = error
                waiter.woken.set()

    def _of(self, request_id: str) -> list[_Waiter]:
        return [waiter for waiter in self._waiting if waiter.order.request.request_id == request_id]

    def _reserve(self, order: ReserveOrder) -> BlockTable | None:
        return self._engine.reserve(order.request, order.local, order.block_names)

    def _wake_first(self) -> None:
        if self._waiting:
            self._waiting[0].woken.set()


class AbortedAttempts:
    """The newest aborted attempt of each request: an Abort may overtake the Reserve call that it is meant for, which
    would then hold blocks for nobody until its lease ends. Bounded: the oldest is forgotten first.
    """

    def __init__(self, most: int = MAX_ABORTED) -> None:
        self._most = most
        self._attempts: OrderedDict[str, int] = OrderedDict()

    def note(self, request_id: str, attempt: int) -> None:
        self._attempts[request_id] = max(attempt, self._attempts.pop(request_id, 0))
        if len(self._attempts) > self._most:
            self._attempts.popitem(last=False)

    def check(self, request: EngineRequest) -> None:
        """Raises Unavailable when this attempt was aborted before."""
        if request.attempt <= self._attempts.get(request.request_id, -1):
            raise Unavailable("the request was aborted before its reservation")
