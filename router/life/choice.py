"""One answer: its attempts, what its client is given of them, and the report."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from router.life.attempt import Attempt, ChoiceSpec
from router.life.events import EmitPacer, EventStream
from router.life.output import ChoiceOutput
from router.pool.registry import Registry
from router.pool.transports import GRPC
from tandem.errors import TandemError, TransferFailed
from tandem.process import logs
from tandem.timeline import Phase
from tandem.types import ChoiceFinished, Delta, RequestReport
from tandem.v1 import worker_pb2

# Gets why an attempt is followed by another one, and the transport that it used.
OnRetry = Callable[[TandemError, str], None]


class LiveChoice:
    """One answer to a request.

        attempt 0 ──the worker's reason, or a stop string──▶ released ──▶ ChoiceFinished (stop or length)
           │ │                                                  ▲
           │ └─ its KV transfer failed ──▶ released ──▶ attempt 1, by grpc
           │                                              │
           └── cancel, deadline, a worker's failure or loss ──▶ released ──▶ raises

    The second attempt finds the prompt in the prefill worker's cache and samples the same first token (law 1), which
    the client is not given again. `run` is a task of its own; what the client is given is made when the door takes it
    (`_take`): a slow client neither hides a loss nor delays a release.
    """

    def __init__(
        self,
        spec: ChoiceSpec,
        output: ChoiceOutput,
        registry: Registry,
        pacer: EmitPacer,
        events: EventStream,
        on_retry: OnRetry,
    ) -> None:
        self._spec = spec
        self._output = output
        self._registry = registry
        self._pacer = pacer
        self._events = events
        self._on_retry = on_retry
        self.timeline = spec.timeline
        # Ids of the tokens that the client has, or is about to; the first alone is ever needed again.
        self._given: tuple[int, ...] = ()
        self._attempt = self._make_attempt(spec)
        self._log = logs.of_request(__name__, spec.request.request_id)

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
        if self._attempt.inbox.decoding_since_ms is not None:
            return Phase.DECODE_STARTED
        return Phase.FIRST_TOKEN if self._attempt.inbox.sealed is None else Phase.KV_SEALED

    async def run(self) -> None:
        """Raises a TandemError unless the choice ends by stop or length."""
        while True:
            try:
                await self._attempt.run()
                break
            except TransferFailed as error:
                self._attempt = self._again(error)
        self._log.debug("finished: %s, %d tokens", self._output.reason, self.output_tokens)
        self._events.put(self._finished())

    def _make_attempt(self, spec: ChoiceSpec) -> Attempt:
        return Attempt(spec, self._registry, self._pacer, lambda: self._events.offer(self._take), self._given)

    def _again(self, error: TransferFailed) -> Attempt:
        """An attempt that goes on from what the client has. Raises the error when there is none."""
        if self._spec.request.attempt > 0 or self.output_tokens > 1:
            raise error  # all tokens that the client has would have to be matched; only the first is
        self._log.warning("attempt 0 by %s failed, once more by %s: %s", self._attempt.transport, GRPC, error)
        self._on_retry(error, self._attempt.transport)
        self._spec = replace(self._spec, request=replace(self._spec.request, attempt=1), transport=GRPC)
        return self._make_attempt(self._spec)

    def _take(self) -> Delta | None:
        """What is new for the client; None for nothing."""
        if self.whole:
            return None
        try:
            tokens, text = self._output.push(self._attempt.inbox.take())
        except Exception as error:  # a bug: the choice ends by it
            self._attempt.scope.fail(error)
            return None
        if self.whole:
            self.timeline.mark(Phase.FINISHED)
            self._attempt.answered()
        elif not tokens:
            return None
        self._given = self._given or (tokens[0].id,)
        return Delta(self._spec.index, tokens, text, self._output.reason, self._output.stop)

    # Reporting.

    def _finished(self) -> ChoiceFinished:
        reason = self._output.reason
        assert reason is not None
        return ChoiceFinished(self._spec.index, reason, self.output_tokens, self._report(), self._output.stop)

    def _report(self) -> RequestReport:
        self._mark_handoff()
        sealed = self._attempt.inbox.sealed
        summary = worker_pb2.TransferSummary() if sealed is None else sealed.summary
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
        inbox, first_ms = self._attempt.inbox, self._attempt.first_ms
        arrived_ms = inbox.decoding_since_ms
        assert first_ms is not None, "an answer has a first token"
        if arrived_ms is not None:
            # Two connections: decode tokens can overtake the first token.
            arrived_ms = max(arrived_ms, first_ms)
        if inbox.sealed is not None:
            latest_ms = self.timeline.marks[Phase.FINISHED] if arrived_ms is None else arrived_ms
            self.timeline.mark(Phase.KV_SEALED, min(first_ms + inbox.sealed.after_first_token_ms, latest_ms))
        if arrived_ms is not None:
            # The end of the first decode step: measured from the seal if the workers said so, else its arrival here.
            sealed_ms, gap_ms = self.timeline.marks.get(Phase.KV_SEALED), inbox.decode_gap_ms
            measured_ms = math.inf if sealed_ms is None or gap_ms is None else sealed_ms + gap_ms
            self.timeline.mark(Phase.DECODE_STARTED, min(measured_ms, arrived_ms))
