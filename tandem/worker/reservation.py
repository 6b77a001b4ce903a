"""Blocks reserved for a request: from Reserve, through the arrival of the KV, to the last token."""

from __future__ import annotations

import asyncio
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

from kv_transfer.base import TransferSummary
from tandem import wire
from tandem.engine.block_pool import BlockTable
from tandem.engine.sequence import EngineEvent, Failed, Names, NewToken, Sequence
from tandem.errors import DeadlineExceeded, TandemError, TransferFailed, Unavailable
from tandem.process import logs
from tandem.types import EngineRequest, FinishReason
from tandem.v1 import common_pb2, worker_pb2
from tandem.worker.engine_thread import EngineThread

Emit = Callable[[worker_pb2.RequestTokens], None]


@dataclass(frozen=True)
class ReserveOrder:
    """What a Reserve call asks for."""

    request: EngineRequest
    # Names of the prompt's full blocks (Engine.name_blocks).
    block_names: Names
    # The subscription that the tokens go to.
    subscriber_id: str
    # This worker computes the prompt, straight into the reserved blocks; else the KV comes in a transfer.
    local: bool
    # Until the first renewal.
    lease_s: float
    # On the event loop's clock; None: the request has none.
    deadline: float | None


class ReservationState(StrEnum):
    RESERVED = "reserved"
    RECEIVING = "receiving"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    ENDED = "ended"


class Reservation(ABC):
    """One request on the decode side; a kv_transfer IncomingTransfer.

        IncomingReservation   reserved ──claim──▶ receiving  ──sealed──▶ decoding ──last token──▶ ended
        LocalReservation      reserved ──lend───▶ prefilling ──sealed──▶ decoding ──last token──▶ ended

        in every state: transfer, prefill or engine fails, abort, deadline, end of the lease ──▶ ended

    Ending happens once, frees the blocks at once (or when a write under way is through: BlockTable.in_use) and
    forgets the id, so whatever arrives later finds nothing. The lease runs in every state: a router that is gone, or
    whose Abort got lost, renews it no more.
    """

    # See IncomingTransfer.
    local: bool

    def __init__(
        self,
        thread: EngineThread,
        order: ReserveOrder,
        table: BlockTable,
        emit: Emit,
        on_end: Callable[[Reservation], None],
    ) -> None:
        # 128 random bits: whoever knows the id was told it by this worker, through the router.
        self.id = secrets.token_hex(16)
        self.state = ReservationState.RESERVED
        self.order = order
        self.request = order.request
        self.table = table
        # What a transfer asks: see IncomingTransfer.
        self.request_id, self.attempt = order.request.request_id, order.request.attempt
        self.pool, self.blocks = thread.engine.cache.pool, table.blocks
        self.cached_tokens, self.prompt_tokens = table.cached_tokens, len(order.request.prompt_ids)
        self._thread = thread
        self._emit = emit
        self._on_end = on_end
        self._log = logs.of_request(__name__, self.request_id)
        self._sequence: Sequence | None = None
        # When the KV was whole, or the prefill began here; until the first token is emitted.
        self._sealed_s: float | None = None
        # Ends a transfer under way.
        self._report_over: Callable[[TandemError], None] | None = None
        self._lease_s = 0.0
        self._lease: asyncio.TimerHandle | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self.renew(order.lease_s)
        if order.deadline is not None:
            late = DeadlineExceeded("the request's deadline passed on the decode worker")
            self._deadline = asyncio.get_running_loop().call_at(order.deadline, self.fail, late)

    # IncomingTransfer

    @abstractmethod
    def claim(self) -> None:
        """See IncomingTransfer."""

    @abstractmethod
    def writing(self) -> AbstractContextManager[None]:
        """See IncomingTransfer."""

    @abstractmethod
    async def sealed(self, first_token: int, summary: TransferSummary) -> None:
        """See IncomingTransfer."""

    def touch(self) -> None:
        """A frame arrived: the lease starts again."""
        self.renew(self._lease_s)

    def when_over(self, report: Callable[[TandemError], None]) -> None:
        """See IncomingTransfer."""
        self._report_over = report

    def abandoned(self) -> None:
        """The request ended with its first token, which the prefill side reports."""
        self.end()

    def failed(self, error: TandemError) -> None:
        """The transfer broke, or the prefill here. The prefill side tells the router; here the blocks are freed."""
        self._log.info("transfer failed: %s", error.message)
        self.end()

    # Decoding

    def listener(self, event: EngineEvent) -> None:
        """Gets what the engine brings of the sequence that decodes here."""
        if self.state is ReservationState.ENDED:
            return
        if isinstance(event, NewToken):
            self._emit_token(event)
        elif isinstance(event, Failed):
            self.fail(event.error)

    def _emit_token(self, event: NewToken) -> None:
        message = self._message(position=event.position, finish_reason=event.finish_reason)
        message.tokens.append(wire.token_to_wire(event.token))
        if self._sealed_s is not None:
            message.decode_gap_ms = (time.monotonic() - self._sealed_s) * 1000
            self._sealed_s = None
        self._emit(message)
        if event.finish_reason is not None:
            self.end()

    def _message(
        self,
        position: int = 0,
        finish_reason: FinishReason | None = None,
        failure: common_pb2.Failure | None = None,
    ) -> worker_pb2.RequestTokens:
        return worker_pb2.RequestTokens(
            request_id=self.request_id,
            attempt=self.attempt,
            position=position,
            finish_reason=wire.reason_to_wire(finish_reason),
            failure=failure,
        )

    def _advance(self, before: ReservationState, after: ReservationState) -> None:
        """Raises TransferFailed in any other state than `before`."""
        if self.state is not before:
            raise self._over()
        self.state = after

    def _over(self) -> TransferFailed:
        return TransferFailed(f"the reservation of request {self.request_id} is {self.state} already")

    # Lease and end

    def renew(self, lease_s: float) -> None:
        """The request ends by itself in lease_s unless it is renewed before."""
        if self.state is ReservationState.ENDED:
            return
        if self._lease is not None:
            self._lease.cancel()
        self._lease_s = lease_s
        self._lease = asyncio.get_running_loop().call_later(lease_s, self._expire)

    def _expire(self) -> None:
        self._log.warning("its lease ended while it was %s", self.state)
        self.fail(Unavailable(f"the router did not renew the request's lease for {self._lease_s:g} s"))

    def fail(self, error: TandemError) -> None:
        """Ends it and says so: somebody may still wait for its tokens."""
        self._emit(self._message(failure=wire.failure_to_wire(error), finish_reason=FinishReason.ERROR))
        self.end(error)

    def end(self, cause: TandemError | None = None) -> None:
        """Frees everything; a second call does nothing.

        cause: reported to a prefill that is under way here; the sender of a transfer is told only of a deadline.
        """
        if self.state is ReservationState.ENDED:
            return
        self.state = ReservationState.ENDED
        for timer in (self._lease, self._deadline):
            if timer is not None:
                timer.cancel()
        if self._sequence is None:
            self.table.release()
        else:
            # The engine may be writing into the blocks this very moment: it frees them between steps.
            self._thread.post(partial(self._thread.engine.abort, self._sequence))
        if self._report_over is not None:
            self._report_over(cause if isinstance(cause, DeadlineExceeded) else self._over())
        self._on_end(self)


class IncomingReservation(Reservation):
    """Its KV comes in a transfer from another worker."""

    local = False

    def claim(self) -> None:
        """See IncomingTransfer."""
        if self.state is not ReservationState.RESERVED:
            raise TransferFailed(f"the reservation of request {self.request_id} already has its transfer")
        self.state = ReservationState.RECEIVING

    @contextmanager
    def writing(self) -> Iterator[None]:
        """While inside, the blocks go to nobody else. Raises TransferFailed when the reservation is over."""
        with self.table.in_use():
            yield

    async def sealed(self, first_token: int, summary: TransferSummary) -> None:
        """The KV is whole and verified: decoding may start. Raises TransferFailed when the reservation is over."""
        self._advance(ReservationState.RECEIVING, ReservationState.DECODING)
        self._sealed_s = time.monotonic()
        self._sequence = Sequence(
            self.request,
            self.listener,
            decode_here=True,
            table=self.table,
            output_ids=[first_token],
            prompt_names=self.order.block_names,
        )
        self._thread.post(partial(self._thread.engine.attach, self._sequence))
