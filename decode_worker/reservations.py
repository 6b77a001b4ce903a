"""Blocks promised to requests: from Reserve, through the arrival of the KV, to the last token."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum

from decode_worker.order import Order
from kv_transfer.base import TransferSummary
from tandem import wire
from tandem.engine.block_pool import BlockTable
from tandem.engine.sequence import EngineEvent, Failed, NewToken, Sequence
from tandem.errors import DeadlineExceeded, TandemError, TransferFailed, Unavailable
from tandem.process import logs
from tandem.types import FinishReason
from tandem.v1 import common_pb2, worker_pb2
from tandem.worker.host import WorkerHost


class State(StrEnum):
    PROMISED = "promised"
    DECODING = "decoding"
    ENDED = "ended"


class Reservation:
    """One request on the decode side; a kv_transfer Landing and a tandem.worker Promise.

        promised ──sealed (remote) / begin (this worker prefills)──▶ decoding ──last token──▶ ended
           └── transfer fails ──▶ ended                                 └── engine fails ──▶ ended
           └── abort, deadline, end of the lease: in every state ──▶ ended

    Ending happens once, frees the blocks at once (or when a write under way is through: BlockTable.in_use) and
    forgets the id, so whatever arrives later finds nothing. The lease runs in every state: a router that is gone, or
    whose Abort got lost, renews it no more.
    """

    def __init__(
        self,
        host: WorkerHost,
        order: Order,
        table: BlockTable,
        emit: Callable[[worker_pb2.RequestTokens], None],
        on_end: Callable[[Reservation], None],
    ) -> None:
        # 128 random bits: whoever knows the id was told it by this worker, through the router.
        self.id = secrets.token_hex(16)
        self.request = order.request
        self.block_names = order.block_names
        self.local = order.local
        self.subscriber_id = order.subscriber_id
        self.table = table
        self.state = State.PROMISED
        self.pool = host.engine.cache.pool
        self._host = host
        self._log = logs.of_request(__name__, self.request_id)
        self._emit = emit
        self._on_end = on_end
        self._sequence: Sequence | None = None
        # Of a local reservation until the seal: whoever prefills has not told the first token yet.
        self._held: list[NewToken] | None = None
        self._sealed_s: float | None = None
        # Ends a transfer under way.
        self._tell_over: Callable[[TandemError], None] | None = None
        self._lease_s = 0.0
        self._lease: asyncio.TimerHandle | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self.renew(order.lease_s)
        if order.deadline is not None:
            self._deadline = asyncio.get_running_loop().call_at(order.deadline, self._deadline_passed)

    # Landing

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def attempt(self) -> int:
        return self.request.attempt

    @property
    def blocks(self) -> tuple[int, ...]:
        return self.table.blocks

    @property
    def cached_tokens(self) -> int:
        return self.table.cached_tokens

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt_ids)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """While inside, the blocks go to nobody else. Raises TransferFailed when the reservation is over."""
        if self.local:
            yield  # the engine alone writes, and frees the blocks between its own steps
            return
        with self.table.in_use():
            yield

    def touch(self) -> None:
        """A frame arrived: the lease starts again."""
        self.renew(self._lease_s)

    def when_over(self, tell: Callable[[TandemError], None]) -> None:
        """See Landing."""
        self._tell_over = tell

    async def sealed(self, first_token: int, summary: TransferSummary) -> None:
        """The KV is whole and verified: decoding may start. Raises TransferFailed when the reservation is over."""
        if self.local:
            if self.state is State.ENDED:
                raise self._over()
            self._let_go()
            return  # the engine went on by itself, perhaps to the end
        sequence = Sequence(
            self.request,
            self.listener,
            decode_here=True,
            table=self.table,
            output_ids=[first_token],
            prompt_names=self.block_names,
        )
        self._start(sequence)
        self._host.thread.post(lambda: self._host.engine.attach(sequence))

    def abandoned(self) -> None:
        """The request ended with its first token, which the prefill side tells."""
        self.end()

    def failed(self, error: TandemError) -> None:
        """The transfer broke. The prefill side tells the router; here the blocks are freed."""
        self._log.info("transfer failed: %s", error.message)
        self.end()

    # Promise

    def begin(self, sequence: Sequence) -> None:
        """The blocks are lent to a colocated prefill, which goes on decoding in them."""
        if not self.local:
            raise TransferFailed(f"the reservation of request {self.request_id} is for KV from another worker")
        self._start(sequence)
        self._held = []

    def _let_go(self) -> None:
        held, self._held = self._held, None
        for event in held or ():
            self.listener(event)

    def _start(self, sequence: Sequence) -> None:
        if self.state is not State.PROMISED:
            raise self._over()
        self._sequence = sequence
        self._sealed_s = time.monotonic()
        self.state = State.DECODING

    def _over(self) -> TransferFailed:
        return TransferFailed(f"the reservation of request {self.request_id} is {self.state} already")

    def listener(self, event: EngineEvent) -> None:
        if self.state is State.ENDED:
            return
        if isinstance(event, NewToken) and self._held is not None:
            self._held.append(event)
        elif isinstance(event, NewToken):
            self._on_token(event)
        elif isinstance(event, Failed):
            self.fail(event.error)

    def _on_token(self, event: NewToken) -> None:
        message = self._message(position=event.position, finish_reason=event.finish_reason)
        message.tokens.append(wire.token_to_wire(event.token))
        if self._sealed_s is not None:
            message.decode_gap_ms = (time.monotonic() - self._sealed_s) * 1000
            self._sealed_s = None
        self._emit(message)
        if event.finish_reason is not None:
            self.end()

    # Lease and end

    def renew(self, lease_s: float) -> None:
        """The request ends by itself in lease_s unless it is renewed before."""
        if self.state is State.ENDED:
            return
        if self._lease is not None:
            self._lease.cancel()
        self._lease_s = lease_s
        self._lease = asyncio.get_running_loop().call_later(lease_s, self._expire)

    def end(self, cause: TandemError | None = None) -> None:
        """Frees everything; a second call does nothing.

        cause: told to a colocated prefill that is still under way; a transfer's sender hears only of a deadline.
        """
        if self.state is State.ENDED:
            return
        self.state = State.ENDED
        for timer in (self._lease, self._deadline):
            if timer is not None:
                timer.cancel()
        sequence = self._sequence
        if sequence is not None and self._held is not None:
            # The engine drops it without a word, and its Prefill call waits for the first token.
            sequence.listener(Failed(cause or TransferFailed("the reservation ended before the handoff")))
        if sequence is not None:
            # The engine may be writing into the blocks this very moment: it frees them between steps.
            self._host.thread.post(lambda: self._host.engine.abort(sequence))
        else:
            self.table.release()
        if self._tell_over is not None:
            self._tell_over(cause if isinstance(cause, DeadlineExceeded) else self._over())
        self._on_end(self)

    def _expire(self) -> None:
        self._log.warning("its lease ended while it was %s", self.state)
        self.fail(Unavailable(f"the router did not renew the request's lease for {self._lease_s:g} s"))

    def _deadline_passed(self) -> None:
        self.fail(DeadlineExceeded("the request's deadline passed on the decode worker"))

    def fail(self, error: TandemError) -> None:
        """Ends it and says so: somebody may still wait for its tokens."""
        self._emit(self._message(failure=wire.failure_to_wire(error), finish_reason=FinishReason.ERROR))
        self.end(error)

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
