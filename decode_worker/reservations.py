"""Blocks promised to requests: from Reserve, through the arrival of the KV, to the last token."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum

from kv_transfer.base import TransferSummary
from tandem import wire
from tandem.engine.block_pool import BlockTable
from tandem.engine.sequence import EngineEvent, Failed, NewToken, Sequence
from tandem.errors import TandemError, TransferFailed
from tandem.types import EngineRequest, FinishReason
from tandem.v1 import common_pb2, worker_pb2
from tandem.worker.host import WorkerHost

log = logging.getLogger(__name__)


class State(StrEnum):
    PROMISED = "promised"
    DECODING = "decoding"
    ENDED = "ended"


class Reservation:
    """One request on the decode side; a kv_transfer Landing and a tandem.worker Promise.

        promised ──sealed (remote) / begin (this worker prefills)──▶ decoding ──last token──▶ ended
           └── lease ends, transfer fails, abort ──────────────────────┴── abort, engine fails ──▶ ended

    Ending happens once, frees the blocks at once (or when a write under way is through: BlockTable.in_use) and
    forgets the id, so whatever arrives later finds nothing.
    """

    def __init__(
        self,
        host: WorkerHost,
        request: EngineRequest,
        table: BlockTable,
        subscriber_id: str,
        emit: Callable[[worker_pb2.RequestTokens], None],
        on_end: Callable[[Reservation], None],
    ) -> None:
        # 128 random bits: whoever knows the id was told it by this worker, through the router.
        self.id = secrets.token_hex(16)
        self.request = request
        self.table = table
        self.subscriber_id = subscriber_id
        self.state = State.PROMISED
        self.pool = host.engine.cache.pool
        self._host = host
        self._emit = emit
        self._on_end = on_end
        self._sequence: Sequence | None = None
        self._lent = False
        # Of a lent reservation until the seal: whoever prefills has not told the first token yet.
        self._held: list[NewToken] | None = None
        self._sealed_s: float | None = None
        self._lease_s = 0.0
        self._lease: asyncio.TimerHandle | None = None

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
        if self._lent:
            yield  # the engine alone writes, and frees the blocks between its own steps
            return
        with self.table.in_use():
            yield

    def touch(self) -> None:
        """A frame arrived: the lease starts again."""
        self.renew(self._lease_s)

    async def sealed(self, first_token: int, summary: TransferSummary) -> None:
        """The KV is whole and verified: decoding may start. Raises TransferFailed when the reservation is over."""
        if self._lent:
            self._let_go()
            return  # the engine went on by itself, perhaps to the end
        sequence = Sequence(self.request, self.listener, decode_here=True, table=self.table, output_ids=[first_token])
        self._start(sequence)
        self._host.thread.post(lambda: self._host.engine.attach(sequence))

    def failed(self, error: TandemError) -> None:
        """The transfer broke. The prefill side tells the router; here the blocks are freed."""
        log.info("request %s: transfer failed: %s", self.request_id, error.message)
        self.end()

    # Promise

    def begin(self, sequence: Sequence) -> None:
        """The blocks are lent to a colocated prefill, which goes on decoding in them."""
        self._start(sequence)
        self._lent, self._held = True, []

    def _let_go(self) -> None:
        held, self._held = self._held, None
        for event in held or ():
            self.listener(event)

    def _start(self, sequence: Sequence) -> None:
        """From here on the engine's own events end the reservation, not the lease."""
        if self.state is not State.PROMISED:
            raise TransferFailed(f"the reservation of request {self.request_id} is {self.state} already")
        self._sequence = sequence
        self._sealed_s = time.monotonic()
        self.state = State.DECODING
        self._stop_lease()

    def listener(self, event: EngineEvent) -> None:
        if self.state is State.ENDED:
            return
        if isinstance(event, NewToken) and self._held is not None:
            self._held.append(event)
        elif isinstance(event, NewToken):
            self._on_token(event)
        elif isinstance(event, Failed):
            self._emit(self._message(failure=wire.failure_to_wire(event.error), finish_reason=FinishReason.ERROR))
            self.end()

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
        """The reservation ends by itself in lease_s unless it is sealed or renewed before."""
        if self.state is not State.PROMISED:
            return
        self._stop_lease()
        self._lease_s = lease_s
        self._lease = asyncio.get_running_loop().call_later(lease_s, self._expire)

    def end(self) -> None:
        """Frees everything; a second call does nothing."""
        if self.state is State.ENDED:
            return
        self.state = State.ENDED
        self._stop_lease()
        sequence = self._sequence
        if sequence is not None:
            # The engine may be writing into the blocks this very moment: it frees them between steps.
            self._host.thread.post(lambda: self._host.engine.abort(sequence))
        else:
            self.table.release()
        self._on_end(self)

    def _expire(self) -> None:
        log.warning("request %s: the lease of its reservation ended before the seal", self.request_id)
        self.end()

    def _stop_lease(self) -> None:
        if self._lease is not None:
            self._lease.cancel()
            self._lease = None

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
