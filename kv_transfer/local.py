"""Transport `local`: prefill computed straight into the reservation's blocks, so only the block table changes hands."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager

from kv_transfer.admission import Admission, Claims
from kv_transfer.base import Counters, Landing, Landings, Sender, Source, Target, TransferSummary
from kv_transfer.coverage import Coverage
from kv_transfer.sender import check_source, opening_of
from tandem.errors import DeadlineExceeded, InternalError, Refused, TandemError, TransferFailed


class LocalTransport:
    """Both ends in one process, on one pool. `counters` counts transfers; bytes stay 0, for nothing moves."""

    name = "local"

    def __init__(self, landings: Landings, claims: Claims | None = None) -> None:
        self.counters = Counters()
        self._admission = Admission(landings, claims, local=True)

    @asynccontextmanager
    async def open(self, source: Source, target: Target) -> AsyncIterator[Sender]:
        """See Transport. The engine writes into the landing's blocks: it must have stopped when the context is left."""
        opening = opening_of(target)
        landing = self._admission.claim(opening)
        sender = None
        try:
            coverage = self._admission.check(landing, opening)
            _check_same_blocks(source, target, landing)
            with ExitStack() as writing:
                writing.enter_context(landing.writing())
                sender = _LocalSender(landing, coverage, target, writing, self.counters)
                yield sender
        except BaseException as error:
            if sender is None or not sender.over:
                self._fail(landing, _reason(error))
            raise
        if not sender.over:
            self._fail(landing, _left())

    async def aclose(self) -> None:
        """See Transport. Nothing outlives a transfer here, and open ones end with the calls that hold them."""

    def _fail(self, landing: Landing, error: TandemError) -> None:
        self.counters.failures += 1
        landing.failed(error)


class _LocalSender:
    def __init__(
        self, landing: Landing, coverage: Coverage, target: Target, writing: ExitStack, counters: Counters
    ) -> None:
        # Sealed or abandoned.
        self.over = False
        self._landing = landing
        self._coverage = coverage
        self._target = target
        # Holds landing.writing() while the engine writes.
        self._writing = writing
        self._counters = counters
        self._started = time.monotonic()

    async def send(self, layers: range, tokens: range) -> None:
        """See Sender. Nothing is copied; the range is checked and the lease extended."""
        self._check_deadline()
        fresh = range(max(tokens.start, self._target.cached_tokens), tokens.stop)
        if not fresh:
            return
        with self._landing.writing():  # raises when the lease is broken
            self._coverage.add(layers, fresh)
        self._landing.touch()

    async def seal(self, first_token: int, prefilled_s: float | None = None) -> TransferSummary:
        """See Sender. There is nothing to hide."""
        self._check_deadline()
        self._coverage.check_complete()
        self._writing.close()
        summary = TransferSummary(0, 0, 0.0)
        await self._landing.sealed(first_token, summary)
        self.over = True
        self._counters.sealed(summary.seconds)
        return summary

    async def abandon(self) -> None:
        """See Sender."""
        self._writing.close()
        self._landing.abandoned()
        self.over = True

    def _check_deadline(self) -> None:
        limit = self._target.deadline_s
        if limit is not None and time.monotonic() - self._started > limit:
            raise DeadlineExceeded("the deadline passed before the KV was handed over")


def _check_same_blocks(source: Source, target: Target, landing: Landing) -> None:
    check_source(source, target)
    if source.pool.data_ptr() != landing.pool.data_ptr() or [*source.blocks] != [*landing.blocks]:
        raise Refused("the local transport needs the prefill to compute into the reservation's own blocks")


def _reason(error: BaseException) -> TandemError:
    if isinstance(error, TandemError):
        return error
    if isinstance(error, asyncio.CancelledError):
        return _left()
    return InternalError("a bug ended the transfer; the worker's log has the details")


def _left() -> TandemError:
    return TransferFailed("the sender left before the seal")
