"""One answer: its attempts, what its client is given of them, and the report."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

from router.aio import first_error
from router.life.attempt import Attempt, Brief
from router.life.output import ChoiceOutput, Step
from router.pool.registry import Registry
from router.pool.transports import GRPC
from tandem.errors import InternalError, TandemError, TransferFailed
from tandem.process import logs
from tandem.timeline import Phase
from tandem.types import ChoiceFinished, Delta, Event, RequestReport
from tandem.v1 import worker_pb2

Emit = Callable[[Event], Coroutine[Any, Any, None]]
# Gets why an attempt is followed by another one, and the transport that it used.
OnRetry = Callable[[TandemError, str], None]


class Choice:
    """One answer to a request.

        attempt 0 ──the worker's reason, or a stop string──▶ released ──▶ ChoiceFinished (stop or length)
           │ │                                                  ▲
           │ └─ its KV transfer failed ──▶ released ──▶ attempt 1, by grpc
           │                                              │
           └── cancel, deadline, a worker's failure or loss ──▶ released ──▶ raises

    The second attempt finds the prompt in the prefill worker's cache and samples the same first token (law 1), which
    the client is not given again. Of an attempt, one task reads the Prefill call, one waits for the mailbox to fail,
    and this one hands tokens to the client: a slow client neither hides a loss nor delays a release. Only handing over
    the first token outlives its attempt: a write that has begun cannot be taken back.
    """

    def __init__(self, brief: Brief, output: ChoiceOutput, registry: Registry, emit: Emit, on_retry: OnRetry) -> None:
        self._brief = brief
        self._output = output
        self._registry = registry
        self._emit = emit
        self._on_retry = on_retry
        self.timeline = brief.timeline
        self._attempt = Attempt(brief, registry)
        # Of the first token, once the client has it or is about to.
        self._first_id: int | None = None
        # Ends with the choice, not with an attempt.
        self._tasks: asyncio.TaskGroup
        # Why it was ended from outside.
        self._doom: TandemError | None = None
        self._log = logs.of_request(__name__, brief.request.request_id)

    @property
    def prefill_worker(self) -> str:
        """Its id; empty until placed."""
        return self._attempt.prefill_worker

    @property
    def decode_worker(self) -> str:
        """Its id; empty until placed."""
        return self._attempt.decode_worker

    @property
    def output_tokens(self) -> int:
        return self._output.tokens

    @property
    def whole(self) -> bool:
        """It has ended by stop or length."""
        return self._output.reason is not None

    @property
    def cached_prompt_tokens(self) -> int:
        return self._attempt.started.cached_tokens

    @property
    def phase(self) -> Phase:
        """The furthest phase that the router knows of now; the report says when the workers' phases began."""
        if self.timeline.phase is not Phase.FIRST_TOKEN:
            return self.timeline.phase
        if self._attempt.box.decoding_since_ms is not None:
            return Phase.DECODE_STARTED
        return Phase.FIRST_TOKEN if self._attempt.sealed is None else Phase.KV_SEALED

    def fail(self, error: TandemError) -> None:
        """Ends the choice from outside."""
        self._doom = error
        self._attempt.box.fail(error)

    async def run(self) -> None:
        """Raises a TandemError unless the choice ends by stop or length."""
        with first_error():
            async with asyncio.TaskGroup() as self._tasks:
                await self._answer()
        self._log.debug("finished: %s, %d tokens", self._output.reason, self.output_tokens)
        await self._emit(self._finished())

    async def _answer(self) -> None:
        try:
            await self._try(self._attempt)
        except TransferFailed as error:
            if self._doom is not None:
                raise self._doom from None
            if self.output_tokens > 1:
                raise  # the second attempt's would have to be matched with what the client has; only the first is
            self._log.warning("attempt 0 by %s failed, once more by %s: %s", self._attempt.transport, GRPC, error)
            self._on_retry(error, self._attempt.transport)
            self._attempt = Attempt(self._second_brief(), self._registry)
            await self._try(self._attempt)

    def _second_brief(self) -> Brief:
        return replace(self._brief, request=replace(self._brief.request, attempt=1), transport=GRPC)

    async def _try(self, attempt: Attempt) -> None:
        attempt.place()
        try:
            with first_error():
                async with asyncio.TaskGroup() as tasks:
                    watch = tasks.create_task(attempt.box.watch())
                    await self._serve(attempt, tasks)
                    watch.cancel()
        finally:
            await attempt.release()

    async def _serve(self, attempt: Attempt, tasks: asyncio.TaskGroup) -> None:
        await attempt.reserve()
        prefill = tasks.create_task(attempt.prefill())
        repeated = self._first_id is not None
        while self._output.reason is None:
            steps = await attempt.box.take()
            if repeated:
                steps, repeated = self._without_first(steps), False
            await self._give(steps)
        self.timeline.mark(Phase.FINISHED)
        await attempt.settle(prefill)

    async def _give(self, steps: list[Step]) -> None:
        tokens, text = self._output.push(steps)
        if not tokens and self._output.reason is None:
            return
        telling = self._emit(Delta(self._brief.index, tokens, text, self._output.reason, self._output.stop))
        if self._first_id is None:
            self._first_id = tokens[0].id
            await asyncio.shield(self._tasks.create_task(telling))  # whoever emits next waits for it: they take turns
        else:
            await telling

    def _without_first(self, steps: list[Step]) -> list[Step]:
        """Of a second attempt, what the first has not told."""
        again = steps[0].tokens[0].id
        if again != self._first_id:
            raise InternalError(f"the first token was {self._first_id}, the second attempt says {again}")
        return steps[1:]

    # Reporting.

    def _finished(self) -> ChoiceFinished:
        reason = self._output.reason
        assert reason is not None
        return ChoiceFinished(self._brief.index, reason, self.output_tokens, self._report(), self._output.stop)

    def _report(self) -> RequestReport:
        self._mark_handoff()
        summary = worker_pb2.TransferSummary() if self._attempt.sealed is None else self._attempt.sealed.summary
        return RequestReport(
            timeline=self.timeline,
            kv_bytes=summary.bytes,
            kv_frames=summary.frames,
            kv_reused_tokens=self._attempt.reservation.cached_tokens,
            kv_transfer_ms=summary.transfer_ms,
            kv_hidden_ms=summary.hidden_ms,
            transport=self._attempt.transport,
            prefill_worker=self.prefill_worker,
            decode_worker=self.decode_worker,
        )

    def _mark_handoff(self) -> None:
        """Places what the workers measured between the first token and the first decode tokens, on this clock."""
        first_ms, arrived_ms = self._attempt.first_ms, self._attempt.box.decoding_since_ms
        assert first_ms is not None, "an answer has a first token"
        if arrived_ms is not None:
            # Two connections: decode tokens can overtake the first token.
            arrived_ms = max(arrived_ms, first_ms)
        if self._attempt.sealed is not None:
            latest_ms = self.timeline.marks[Phase.FINISHED] if arrived_ms is None else arrived_ms
            self.timeline.mark(Phase.KV_SEALED, min(first_ms + self._attempt.sealed.after_first_token_ms, latest_ms))
        if arrived_ms is not None:
            self.timeline.mark(Phase.DECODE_STARTED, self._decode_started_ms(arrived_ms))

    def _decode_started_ms(self, arrived_ms: float) -> float:
        """The end of the first decode step: measured from the seal if the workers said so, else its arrival here."""
        sealed_ms = self.timeline.marks.get(Phase.KV_SEALED)
        if sealed_ms is None or self._attempt.box.decode_gap_ms is None:
            return arrived_ms
        return min(sealed_ms + self._attempt.box.decode_gap_ms, arrived_ms)
