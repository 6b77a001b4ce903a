"""Carrier `local`: prefill computed straight into the reservation's blocks, so only the block table changes hands.

What the two roles of the worker do with it is in tandem/worker/local_reservation.py.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager

from kv_transfer.base import (
    Counters,
    IncomingTransfer,
    IncomingTransfers,
    Sender,
    Source,
    TransferSummary,
    TransferTarget,
)
from kv_transfer.ends.admission import TransferAdmission
from kv_transfer.ends.sender import check_source, opening_of
from kv_transfer.frames.layout import Coverage
from tandem.errors import DeadlineExceeded, InternalError, Refused, TandemError, TransferFailed


class LocalTransport:
    """Both ends in one process, on one pool. `counters` counts transfers; bytes stay 0, for nothing moves."""

    name = "local"

    def __init__(self, transfers: IncomingTransfers) -> None:
        self.counters = Counters()
        self._admission = TransferAdmission(transfers, local=True)

    @asynccontextmanager
    async def open(self, source: Source, target: TransferTarget) -> AsyncIterator[Sender]:
        """See Transport. The engine writes into the reserved blocks: it must have stopped when the context is left."""
        opening = opening_of(target)
        incoming = self._admission.claim(opening)
        sender: LocalSender | None = None
        why: TandemError = TransferFailed("the sender left before the seal")
        try:
            coverage = self._admission.check(incoming, opening)
            check_source(source, target)
            if source.pool.data_ptr() != incoming.pool.data_ptr() or [*source.blocks] != [*incoming.blocks]:
                raise Refused("the local transport needs the prefill to compute into the reservation's own blocks")
            with ExitStack() as writing:
                writing.enter_context(incoming.writing())
                sender = LocalSender(incoming, coverage, target, writing, self.counters)
                yield sender
        except TandemError as error:
            why = error
            raise
        except Exception:
            why = InternalError("a bug ended the transfer; the worker's log has the details")
            raise
        finally:
            if sender is None or not sender.over:
                self.counters.failures += 1
                incoming.failed(why)

    async def aclose(self) -> None:
        """See Transport. Nothing outlives a transfer here, and open ones end with the calls that hold them."""


class LocalSender:
    """See Sender."""

    def __init__(
        self,
        incoming: IncomingTransfer,
        coverage: Coverage,
        target: TransferTarget,
        writing: ExitStack,
        counters: Counters,
    ) -> None:
        # Sealed or abandoned.
        self.over = False
        self._incoming = incoming
        self._coverage = coverage
        self._target = target
        # Holds incoming.writing() while the engine writes.
        self._writing = writing
        self._counters = counters
        self._started = time.monotonic()

    async def send(self, layers: range, tokens: range) -> None:
        """See Sender. Nothing is copied; the range is checked and the lease extended."""
        self._check_deadline()
        fresh = range(max(tokens.start, self._target.cached_tokens), tokens.stop)
        if not fresh:
            return
        with self._incoming.writing():  # raises when the lease is broken
            self._coverage.add(layers, fresh)
        self._incoming.touch()

    async def seal(self, first_token: int, prefilled_s: float | None = None) -> TransferSummary:
        """See Sender. There is nothing to hide."""
        self._check_deadline()
        self._coverage.check_complete()
        self._writing.close()
        summary = TransferSummary(0, 0, 0.0)
        await self._incoming.sealed(first_token, summary)
        self.over = True
        self._counters.sealed(summary.seconds)
        return summary

    async def abandon(self) -> None:
        """See Sender."""
        self._writing.close()
        self._incoming.abandoned()
        self.over = True

    def _check_deadline(self) -> None:
        limit = self._target.deadline_s
        if limit is not None and time.monotonic() - self._started > limit:
            raise DeadlineExceeded("the deadline passed before the KV was handed over")
