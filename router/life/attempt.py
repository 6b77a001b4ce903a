"""One try at an answer: a pair of workers, a reservation, a Prefill call, and their release."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from router.life.output import Step
from router.placement import Demand, WorkerView, blocks_for, choose, choose_prefill
from router.pool.registry import Registry
from router.pool.subscriptions import Mailbox
from router.pool.transports import LOCAL, pick
from router.pool.worker import Worker
from tandem import rpc
from tandem.errors import InternalError, TandemError, Unavailable
from tandem.process import logs
from tandem.timeline import Phase, Timeline
from tandem.types import EngineRequest, FinishReason, Role
from tandem.v1 import worker_pb2
from tandem.wire import reason_from_wire, token_from_wire

# When a worker has told the end, the Prefill call ends by itself: the seal's numbers, for the report, are at most on
# their way, or the transfer is being abandoned, which a cancel would make a failure. Waited for this long.
SETTLE_TIMEOUT_S = 1.0


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
    # router.transport
    transport: str


class Attempt:
    """One try, on one prefill and one decode worker.

        placed ──Reserve──▶ reserved ──Prefill──▶ prefilling ──first token──▶ handing off ──sealed──▶ decoding
           │                   │                      │                           │                      │
           └───────────────────┴──────────────────────┴── ended, whatever way ────┴──────────────────────┘
                                                      ▼
                                                   released

    Released, on every path: the Prefill call is over, and the decode worker either reported the end itself or has
    been sent Abort. What the workers produced waits in `box`, which also says how they failed.
    """

    def __init__(self, brief: Brief, registry: Registry) -> None:
        self._brief = brief
        self._request = brief.request
        self._registry = registry
        self._timeline = brief.timeline
        max_tokens = brief.request.sampling.max_tokens
        self.box = Mailbox(max_tokens, self._timeline.now_ms, registry.turns, self._decode_over)
        self._log = logs.of_request(__name__, brief.request.request_id)
        self.started = worker_pb2.PrefillStarted()
        # When its own first token came.
        self.first_ms: float | None = None
        self.sealed: worker_pb2.Sealed | None = None
        # The prefill worker's token ended the request: nobody decodes.
        self._first_was_last = False
        self._abort: asyncio.Task[None] | None = None
        self.reservation = worker_pb2.Reservation()
        self.transport = ""
        # Ids, for reports; empty until placed.
        self.prefill_worker = self.decode_worker = ""

    # Placing and releasing.

    @property
    def _demand(self) -> Demand:
        return Demand(len(self._request.prompt_ids), self._request.sampling.max_tokens)

    def place(self) -> None:
        """Raises Unavailable, or as choose."""
        request, demand = self._request, self._demand
        views = {view.worker_id: view for view in self._registry.snapshot(self._brief.block_names)}
        placement = choose(tuple(views.values()), demand, self._registry.absent())
        self._decode_on, self.decode_worker = self._registry[placement.decode], placement.decode
        prefill_on = self._registry[placement.prefill]
        # What may raise comes first: nothing would take back what is noted below.
        self.transport = LOCAL if prefill_on is self._decode_on else self._pick(prefill_on)
        self._place_prefill(views[placement.prefill])
        block_size = self._decode_on.model.fingerprint.block_size
        self._decode_on.promised.place(request.request_id, blocks_for(demand.kv_tokens, block_size))
        self._decode_on.subscription.register(request.request_id, request.attempt, self.box)
        self._decode_on.attach(request.request_id, Role.DECODE, self._decode_lost)
        self._log.debug("placed on %s and %s by %s", placement.prefill, placement.decode, self.transport)

    def _place_prefill_again(self) -> None:
        """While the request waited for blocks, its prefill worker may have begun to drain, or gone: then it moves.

        When nobody else is there, a draining worker that has not left yet takes it: it refuses nothing. Raises as
        choose.
        """
        former = self._prefill_on
        if former is self._decode_on or former.takes(Role.PREFILL):
            return
        workers = self._registry.snapshot(self._brief.block_names)
        try:
            chosen = choose_prefill(workers, self._demand.prompt_tokens, self._registry.absent())
        except Unavailable:
            if former.loss is None and Role.PREFILL in former.roles:
                return
            raise
        former.queued.drop(self._request.request_id)
        self._place_prefill(chosen)
        self.transport = self._pick(self._prefill_on)
        self._log.debug("moved from %s to %s before its prefill", former.id, chosen.worker_id)

    def _place_prefill(self, view: WorkerView) -> None:
        self._prefill_on, self.prefill_worker = self._registry[view.worker_id], view.worker_id
        self._to_compute = view.to_compute(self._demand.prompt_tokens)
        self._prefill_on.queued.place(self._request.request_id, self._to_compute)

    def _pick(self, source: Worker) -> str:
        target = self._decode_on
        kv_bytes = self._demand.prompt_tokens * source.model.fingerprint.token_bytes
        return pick(self._brief.transport, source.hello.transports, target.hello.transports, kv_bytes)

    def _prefill_lost(self, error: TandemError) -> None:
        if not self._handed_off:
            self.box.fail(error)

    def _decode_lost(self, error: TandemError) -> None:
        """Not called any more once the worker has told its last token."""
        if not self._first_was_last:
            self.box.fail(error)

    @property
    def _handed_off(self) -> bool:
        """Decode runs only on sealed KV: from its first tokens on the prefill worker is not needed, once it has told
        the token that it sampled itself. If that was the last one, there is nothing to hand off."""
        decoding = self.sealed is not None or self.box.decoding_since_ms is not None
        return self.box.first_arrived and (decoding or self._first_was_last)

    def _prefill_over(self) -> None:
        self._prefill_on.queued.drop(self._request.request_id)
        self._prefill_on.prefill_pace.dropped(self._request.request_id)
        self._prefill_on.detach(self._request.request_id, Role.PREFILL)

    def _decode_over(self) -> None:
        """Nothing depends on the decode worker: it may leave, however slowly the client reads."""
        self._decode_on.leases.discard(self.reservation.reservation_id)
        self._decode_on.detach(self._request.request_id, Role.DECODE)

    async def release(self) -> None:
        """The Prefill call is over already: its task is."""
        request = self._request
        self._prefill_over()
        self._decode_on.promised.drop(request.request_id)
        self._decode_over()
        self._decode_on.subscription.forget(request.request_id, request.attempt)
        if not self.box.decode_ended:
            # Shielded: a client that leaves while we wait cannot stop the release.
            await asyncio.shield(self._aborting())

    def _aborting(self) -> asyncio.Task[None]:
        """The decode worker's Abort, from the first call on."""
        if self._abort is None:
            self._abort = self._decode_on.abort(self._request.request_id, self._request.attempt)
        return self._abort

    # Serving.

    def _remaining_s(self) -> float:
        return max(0.0, self._brief.deadline - asyncio.get_running_loop().time())

    async def reserve(self) -> None:
        self.reservation = await self._decode_on.reserve(self._request, self.transport, self._remaining_s())
        self._decode_on.promised.taken(self._request.request_id, self.reservation.counted_from)
        self._decode_on.leases.add(self.reservation.reservation_id)
        self._timeline.mark(Phase.RESERVED)

    async def prefill(self) -> None:
        """Runs until nothing is to be expected of the prefill worker."""
        self._place_prefill_again()
        if self._request.attempt == 0:  # a client that has its first token is not told that it comes too late
            self._prefill_on.prefill_pace.check(self._to_compute, self._remaining_s())
        self._prefill_on.attach(self._request.request_id, Role.PREFILL, self._prefill_lost)
        call = self._prefill_on.prefill(self._request, self._target(), self._remaining_s())
        self._prefill_on.prefill_pace.sent(self._request.request_id, self._to_compute)
        try:
            with self._prefill_on.calling(Role.PREFILL):
                self._prefill_on.queued.taken(self._request.request_id, await rpc.counted_from(call))
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
            reservation_id=self.reservation.reservation_id,
            transport=self.transport,
            cached_tokens=self.reservation.cached_tokens,
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
                self.started = event.started
                self._timeline.mark(Phase.PREFILL_STARTED)
            case "first_token":
                self.first_ms = self._timeline.now_ms()
                self._mark_first(self.first_ms, event.first_token.compute_ms)
                self._prefill_on.prefixes.expect(self._brief.block_names)
                self._prefill_on.prefill_pace.computed(self._request.request_id)
                return self._note_first_token(event.first_token)
            case "sealed":
                self.sealed = event.sealed
                self._decode_on.prefixes.expect(self._brief.block_names)
                return True
        return False

    def _mark_first(self, first_ms: float, compute_ms: float) -> None:
        """A short prompt is computed before its start is heard of: often both come at once.

        After a failed attempt the start is that of the one that gave the token; what was lost counts as queueing.
        """
        marks = self._timeline.marks
        if Phase.FIRST_TOKEN not in marks:
            started_ms = max(marks[Phase.RESERVED], first_ms - compute_ms)
            self._timeline.correct(Phase.PREFILL_STARTED, min(started_ms, first_ms))
        self._timeline.mark(Phase.FIRST_TOKEN, first_ms)

    def _note_first_token(self, first: worker_pb2.FirstToken) -> bool:
        reason = reason_from_wire(first.finish_reason)
        if reason in (FinishReason.ABORT, FinishReason.ERROR):
            raise Unavailable(f"prefill worker {self.prefill_worker} ended the request ({reason}) and gave no cause")
        self.box.put_first(Step((token_from_wire(first.token),), reason))
        self._first_was_last = reason is not None
        if self._request.sampling.max_tokens == 1:
            # No transfer began, whose abandoning would free the blocks: the client may take its time to read. What the
            # worker says to that is not about the answer.
            self._decode_on.subscription.forget(self._request.request_id, self._request.attempt)
            self._aborting()
        return self._first_was_last

    async def settle(self, prefill: asyncio.Task[None]) -> None:
        """When the answer is whole: the Prefill call may say its last, and ends."""
        if self.box.decode_ended or self._first_was_last:
            await asyncio.wait({prefill}, timeout=SETTLE_TIMEOUT_S)
        prefill.cancel()
