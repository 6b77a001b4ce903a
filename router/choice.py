"""One answer: from a placement through both workers to its end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from router.aio import first_error
from router.output import ChoiceOutput, Step
from router.placement import Demand, WorkerView, blocks_for, choose, choose_prefill
from router.registry import Registry
from router.subscriptions import Mailbox
from router.worker import Worker
from tandem import logs, rpc
from tandem.errors import InternalError, TandemError, Unavailable
from tandem.timeline import Phase, Timeline
from tandem.types import ChoiceFinished, Delta, EngineRequest, Event, FinishReason, RequestReport, Role
from tandem.v1 import worker_pb2
from tandem.wire import reason_from_wire, token_from_wire

# What this router can order a handoff between two workers to use.
TRANSPORTS = ("grpc",)
# When a worker has told the end, the Prefill call ends by itself: the seal's numbers, for the report, are at most on
# their way, or the transfer is being abandoned, which a cancel would make a failure. Waited for this long.
SETTLE_TIMEOUT_S = 1.0

Emit = Callable[[Event], Awaitable[None]]


@dataclass(frozen=True)
class Brief:
    """What a choice is to do."""

    index: int
    request: EngineRequest
    # Of the prompt's full blocks.
    block_names: tuple[bytes, ...]
    # On the event loop's clock.
    deadline: float
    timeline: Timeline


class Choice:
    """One answer to a request, on one prefill and one decode worker.

        placed ──Reserve──▶ reserved ──Prefill──▶ prefilling ──first token──▶ handing off ──sealed──▶ decoding
           │                   │                      │                           │                      │
           │                   │                      ├── the worker's reason, or a stop string ─────────┤
           │                   │                      ▼                                                  ▼
           │                   │                    ended ──▶ released ──▶ ChoiceFinished (stop or length)
           └───────────────────┴─ cancel, deadline, a worker's failure or loss ──▶ released ──▶ raises

    Released, on every path: the Prefill call is over, and the decode worker either reported the end itself or has
    been sent Abort. One task reads the Prefill call, one waits for the mailbox to fail, and this one hands tokens to
    the client: a slow client neither hides a loss nor delays a release.
    """

    def __init__(self, brief: Brief, output: ChoiceOutput, registry: Registry, emit: Emit) -> None:
        self._brief = brief
        self._request = brief.request
        self._output = output
        self._registry = registry
        self._emit = emit
        self.timeline = brief.timeline
        self._box = Mailbox(brief.request.sampling.max_tokens, self.timeline.now_ms, self._decode_over)
        self._log = logs.of_request(__name__, brief.request.request_id)
        self._started = worker_pb2.PrefillStarted()
        self._sealed: worker_pb2.Sealed | None = None
        # The prefill worker's token ended the request: nobody decodes.
        self._first_was_last = False
        self._abort: asyncio.Task[None] | None = None
        self._reservation = worker_pb2.Reservation()
        self._transport = ""
        # Ids, for reports; empty until placed.
        self.prefill_worker = self.decode_worker = ""

    @property
    def output_tokens(self) -> int:
        return self._output.tokens

    @property
    def cached_prompt_tokens(self) -> int:
        return self._started.cached_tokens

    @property
    def phase(self) -> Phase:
        """The furthest phase that the router knows of now; the report says when the workers' phases began."""
        if self.timeline.phase is not Phase.FIRST_TOKEN:
            return self.timeline.phase
        if self._box.decoding_since_ms is not None:
            return Phase.DECODE_STARTED
        return Phase.FIRST_TOKEN if self._sealed is None else Phase.KV_SEALED

    def fail(self, error: TandemError) -> None:
        """Ends the choice from outside."""
        self._box.fail(error)

    async def run(self) -> None:
        """Raises a TandemError unless the choice ends by stop or length."""
        self._place()
        try:
            with first_error():
                async with asyncio.TaskGroup() as tasks:
                    watch = tasks.create_task(self._box.watch())
                    await self._serve(tasks)
                    watch.cancel()
        finally:
            await self._release()
        self._log.info("finished: %s, %d tokens", self._output.reason, self.output_tokens)
        await self._emit(self._finished())

    # Placing and releasing.

    @property
    def _demand(self) -> Demand:
        return Demand(len(self._request.prompt_ids), self._request.sampling.max_tokens)

    def _place(self) -> None:
        request, demand = self._request, self._demand
        views = {view.worker_id: view for view in self._registry.snapshot(self._brief.block_names)}
        placement = choose(tuple(views.values()), demand)
        self._decode_on, self.decode_worker = self._registry[placement.decode], placement.decode
        self._place_prefill(views[placement.prefill])
        self._transport = _transport(self._prefill_on, self._decode_on)
        block_size = self._decode_on.model.fingerprint.block_size
        self._decode_on.promised.place(request.request_id, blocks_for(demand.kv_tokens, block_size))
        self._decode_on.subscription.register(request.request_id, request.attempt, self._box)
        self._decode_on.attach(request.request_id, Role.DECODE, self._decode_lost)
        self._log.info("placed on %s and %s by %s", placement.prefill, placement.decode, self._transport)

    def _place_prefill_again(self) -> None:
        """While the request waited for blocks, its prefill worker may have begun to drain, or gone: then it moves.

        When nobody else is there, a draining worker that has not left yet takes it: it refuses nothing. Raises as
        choose.
        """
        former = self._prefill_on
        if former is self._decode_on or former.takes(Role.PREFILL):
            return
        try:
            chosen = choose_prefill(self._registry.snapshot(self._brief.block_names), self._demand.prompt_tokens)
        except Unavailable:
            if former.loss is None and Role.PREFILL in former.roles:
                return
            raise
        former.queued.drop(self._request.request_id)
        self._place_prefill(chosen)
        self._log.info("moved from %s to %s before its prefill", former.id, chosen.worker_id)

    def _place_prefill(self, view: WorkerView) -> None:
        self._prefill_on, self.prefill_worker = self._registry[view.worker_id], view.worker_id
        to_compute = view.to_compute(self._demand.prompt_tokens)
        self._prefill_on.queued.place(self._request.request_id, to_compute)

    def _prefill_lost(self, error: TandemError) -> None:
        if not self._handed_off:
            self._box.fail(error)

    def _decode_lost(self, error: TandemError) -> None:
        """Not called any more once the worker has told its last token."""
        if not self._first_was_last:
            self._box.fail(error)

    @property
    def _handed_off(self) -> bool:
        """Decode runs only on sealed KV: from its first tokens on the prefill worker is not needed, once it has told
        the token that it sampled itself. If that was the last one, there is nothing to hand off."""
        decoding = self._sealed is not None or self._box.decoding_since_ms is not None
        return self._box.first_arrived and (decoding or self._first_was_last)

    def _prefill_over(self) -> None:
        self._prefill_on.queued.drop(self._request.request_id)
        self._prefill_on.detach(self._request.request_id, Role.PREFILL)

    def _decode_over(self) -> None:
        """Nothing depends on the decode worker: it may leave, however slowly the client reads."""
        self._decode_on.leases.discard(self._reservation.reservation_id)
        self._decode_on.detach(self._request.request_id, Role.DECODE)

    async def _release(self) -> None:
        """The Prefill call is over already: its task is."""
        request = self._request
        self._prefill_over()
        self._decode_on.promised.drop(request.request_id)
        self._decode_over()
        self._decode_on.subscription.forget(request.request_id, request.attempt)
        if not self._box.decode_ended:
            # Shielded: a client that leaves while we wait cannot stop the release.
            await asyncio.shield(self._aborting())

    def _aborting(self) -> asyncio.Task[None]:
        """The decode worker's Abort, from the first call on."""
        if self._abort is None:
            self._abort = self._decode_on.abort(self._request.request_id, self._request.attempt)
        return self._abort

    # Serving.

    async def _serve(self, tasks: asyncio.TaskGroup) -> None:
        await self._reserve()
        prefill = tasks.create_task(self._prefill())
        while self._output.reason is None:
            tokens, text = self._output.push(await self._box.take())
            if tokens or text:
                await self._emit(Delta(self._brief.index, tokens, text))
        self.timeline.mark(Phase.FINISHED)
        if self._box.decode_ended or self._first_was_last:
            await asyncio.wait({prefill}, timeout=SETTLE_TIMEOUT_S)
        prefill.cancel()

    def _remaining_s(self) -> float:
        return max(0.0, self._brief.deadline - asyncio.get_running_loop().time())

    async def _reserve(self) -> None:
        self._reservation = await self._decode_on.reserve(self._request, self._transport, self._remaining_s())
        self._decode_on.promised.sent(self._request.request_id)
        self._decode_on.leases.add(self._reservation.reservation_id)
        self.timeline.mark(Phase.RESERVED)

    async def _prefill(self) -> None:
        self._place_prefill_again()
        self._prefill_on.attach(self._request.request_id, Role.PREFILL, self._prefill_lost)
        call = self._prefill_on.prefill(self._request, self._target(), self._remaining_s())
        self._prefill_on.queued.sent(self._request.request_id)
        try:
            with self._prefill_on.calling(Role.PREFILL):
                await self._read_prefill(call)
        except TandemError as error:
            if not self._handed_off:
                raise
            self._log.warning("the Prefill call failed after the handoff: %s", error)
        finally:
            call.cancel()
            self._prefill_over()

    def _target(self) -> worker_pb2.TransferTarget:
        """From the registry alone: nothing that a client says decides where KV goes."""
        return worker_pb2.TransferTarget(
            worker_id=self._decode_on.id,
            address=self._decode_on.hello.address,
            reservation_id=self._reservation.reservation_id,
            transport=self._transport,
            cached_tokens=self._reservation.cached_tokens,
        )

    async def _read_prefill(self, call: Any) -> None:
        over = False
        while (event := await rpc.read(call)) is not None:
            over |= self._note_prefill(event)
        if not over:
            raise InternalError(f"prefill worker {self.prefill_worker} ended its call without a seal")

    def _note_prefill(self, event: worker_pb2.PrefillEvent) -> bool:
        """True when the prefill worker has nothing left to do."""
        match event.WhichOneof("event"):
            case "started":
                self._started = event.started
                self.timeline.mark(Phase.PREFILL_STARTED)
            case "first_token":
                self.timeline.mark(Phase.FIRST_TOKEN)
                self._prefill_on.prefixes.expect(self._brief.block_names)
                return self._note_first_token(event.first_token)
            case "sealed":
                self._sealed = event.sealed
                self._decode_on.prefixes.expect(self._brief.block_names)
                return True
        return False

    def _note_first_token(self, first: worker_pb2.FirstToken) -> bool:
        reason = reason_from_wire(first.finish_reason)
        if reason in (FinishReason.ABORT, FinishReason.ERROR):
            raise Unavailable(f"prefill worker {self.prefill_worker} ended the request ({reason}) and gave no cause")
        self._box.put_first(Step((token_from_wire(first.token),), reason))
        self._first_was_last = reason is not None
        if self._request.sampling.max_tokens == 1:
            # No transfer began, whose abandoning would free the blocks: the client may take its time to read.
            self._aborting()
        return self._first_was_last

    # Reporting.

    def _finished(self) -> ChoiceFinished:
        reason = self._output.reason
        assert reason is not None
        return ChoiceFinished(self._brief.index, reason, self.output_tokens, self._report(), self._output.stop)

    def _report(self) -> RequestReport:
        self._mark_handoff()
        summary = worker_pb2.TransferSummary() if self._sealed is None else self._sealed.summary
        return RequestReport(
            timeline=self.timeline,
            kv_bytes=summary.bytes,
            kv_frames=summary.frames,
            kv_reused_tokens=self._reservation.cached_tokens,
            kv_transfer_ms=summary.transfer_ms,
            transport=self._transport,
            prefill_worker=self.prefill_worker,
            decode_worker=self.decode_worker,
        )

    def _mark_handoff(self) -> None:
        """Places what the workers measured between the first token and the first decode tokens, on this clock."""
        first_ms, arrived_ms = self.timeline.marks[Phase.FIRST_TOKEN], self._box.decoding_since_ms
        if arrived_ms is not None:
            # Two connections: decode tokens can overtake the first token.
            arrived_ms = max(arrived_ms, first_ms)
        if self._sealed is not None:
            latest_ms = self.timeline.marks[Phase.FINISHED] if arrived_ms is None else arrived_ms
            self.timeline.mark(Phase.KV_SEALED, min(first_ms + self._sealed.after_first_token_ms, latest_ms))
        if arrived_ms is not None:
            self.timeline.mark(Phase.DECODE_STARTED, self._decode_started_ms(arrived_ms))

    def _decode_started_ms(self, arrived_ms: float) -> float:
        """The end of the first decode step: measured from the seal if the workers said so, else its arrival here."""
        sealed_ms = self.timeline.marks.get(Phase.KV_SEALED)
        if sealed_ms is None or self._box.decode_gap_ms is None:
            return arrived_ms
        return min(sealed_ms + self._box.decode_gap_ms, arrived_ms)


def _transport(source: Worker, target: Worker) -> str:
    if source is target:
        return "local"
    common = [name for name in target.hello.transports if name in TRANSPORTS]
    if not common:
        raise Unavailable(f"decode worker {target.id} cannot receive by {' or '.join(TRANSPORTS)}")
    return common[0]
