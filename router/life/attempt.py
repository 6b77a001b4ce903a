"""One try at an answer: a pair of workers, a reservation, a Prefill call, and their release."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from router.aio import Scope
from router.life.events import EmitPacer
from router.life.inbox import Inbox, Lost, Stage
from router.policy.base import Demand, WorkerView, blocks_for
from router.pool.holds import DecodeHold, PrefillHold
from router.pool.registry import Registry
from router.pool.transports import LOCAL, pick
from tandem.errors import InternalError, TandemError, Unavailable
from tandem.process import logs
from tandem.timeline import Phase, Timeline
from tandem.types import EngineRequest, FinishReason, Role
from tandem.v1 import worker_pb2
from tandem.wire import reason_from_wire, request_to_wire

# When a worker has told the end, the Prefill call ends by itself: the seal's numbers, for the report, are at most on
# their way, or the transfer is being abandoned, which a cancel would make a failure. Waited for this long.
SETTLE_TIMEOUT_S = 1.0


@dataclass(frozen=True)
class ChoiceSpec:
    """What a choice is to do."""

    index: int
    request: EngineRequest
    # Names of the prompt's full blocks.
    block_names: tuple[bytes, ...]
    # On the event loop's clock.
    deadline: float
    timeline: Timeline
    # router.transport
    transport: str


class Attempt:
    """One try, on one prefill and one decode worker, each held by a scope.

        placed ──Reserve──▶ reserved ──Prefill──▶ told to the inbox, whose Stage says how far it is
           │                   │                      │  answered: the choice has taken its last token
           └───────────────────┴── ended in any way ──┴──▶ the scopes are left ──▶ released

    Released, on every path: the Prefill call is over, and the decode worker either reported the end itself or has
    been sent Abort.
    """

    def __init__(
        self,
        spec: ChoiceSpec,
        registry: Registry,
        pacer: EmitPacer,
        offer: Callable[[], object],
        given: Sequence[int] = (),
    ) -> None:
        """offer, given: see Inbox."""
        self._spec = spec
        self._request = spec.request
        self._registry = registry
        self._timeline = spec.timeline
        # Ended when the answer is whole, failed with what ends the attempt.
        self.scope = Scope()
        self._answered = asyncio.Event()
        max_tokens = spec.request.sampling.max_tokens
        self.inbox = Inbox(max_tokens, spec.timeline.now_ms, pacer, offer, self.scope.fail, given)
        self._log = logs.of_request(__name__, spec.request.request_id)
        # For reports: ids, empty until placed, and what the workers told.
        self.prefill_worker = self.decode_worker = self.transport = ""
        self.reservation = worker_pb2.Reservation()
        self.started = worker_pb2.PrefillStarted()
        # When its own first token came.
        self.first_ms: float | None = None

    async def run(self) -> None:
        """Returns when the answer is whole and both workers are released. Raises the TandemError that ended it."""
        self._place()
        blocks = blocks_for(self._demand.kv_tokens, self._decode_on.reported.model.fingerprint.block_size)
        hold = DecodeHold(self._decode_on, self._request, blocks, self.inbox.put, self._lost(Role.DECODE))
        async with hold as decode, self.scope:
            with self._prefill_on.books.expecting(self._request.request_id, self._to_compute):
                self.reservation = await decode.reserve(self.transport, self._remaining_s())
            self._timeline.mark(Phase.RESERVED)
            self._place_prefill_again()
            await self._prefill(decode)
            await self._answered.wait()

    def answered(self) -> None:
        """The choice has all that it wants: the Prefill call may say its last, and ends."""
        self._answered.set()
        self.scope.end(within_s=SETTLE_TIMEOUT_S if self.inbox.state is Stage.ENDED else 0.0)

    def _lost(self, role: Role) -> Callable[[TandemError], None]:
        return lambda error: self.inbox.put(Lost(role, error))

    # Placing.

    @property
    def _demand(self) -> Demand:
        return Demand(len(self._request.prompt_ids), self._request.sampling.max_tokens)

    def _place(self) -> None:
        """Raises Unavailable, or as Placer.choose."""
        prefill, decode = self._registry.place(self._demand, self._spec.block_names)
        self._decode_on, self.decode_worker = self._registry[decode.worker_id], decode.worker_id
        self._place_prefill(prefill)
        self._log.debug("placed on %s and %s by %s", prefill.worker_id, decode.worker_id, self.transport)

    def _place_prefill(self, view: WorkerView) -> None:
        self._prefill_on, self.prefill_worker = self._registry[view.worker_id], view.worker_id
        self._to_compute = view.to_compute(self._demand.prompt_tokens)
        self.transport = LOCAL
        if self._prefill_on is not self._decode_on:
            source, target = self._prefill_on.reported, self._decode_on.reported
            kv_bytes = self._demand.prompt_tokens * source.model.fingerprint.token_bytes
            self.transport = pick(self._spec.transport, source.hello.transports, target.hello.transports, kv_bytes)

    def _place_prefill_again(self) -> None:
        """While the request waited for blocks, its prefill worker may have begun to drain, got other roles, or gone:
        then it moves.

        When nobody else is there, one that has not left yet takes it: it refuses nothing. Raises as Placer.choose.
        """
        former = self._prefill_on
        if former is self._decode_on or former.takes(Role.PREFILL):
            return
        try:
            chosen = self._registry.place_prefill(self._demand.prompt_tokens, self._spec.block_names)
        except Unavailable:
            if former.loss is None:
                return
            raise
        self._place_prefill(chosen)
        self._log.debug("moved from %s to %s before its prefill", former.id, chosen.worker_id)

    def _remaining_s(self) -> float:
        return max(0.0, self._spec.deadline - asyncio.get_running_loop().time())

    # Prefill.

    async def _prefill(self, decode: DecodeHold) -> None:
        """Runs until nothing is to be expected of the prefill worker."""
        worker, request = self._prefill_on, self._request
        if request.attempt == 0:  # a client that has its first token is not told that it comes too late
            worker.books.prefill_pace.check(self._to_compute, self._remaining_s())
        lost = self._lost(Role.PREFILL)
        with PrefillHold(worker, request.request_id, self._to_compute, self._spec.block_names, lost) as prefill:
            try:
                await prefill.start_prefill(self._message(), self._remaining_s())
                await self._read(prefill, decode)
            except TandemError as error:
                if self.inbox.needs(Role.PREFILL) and not self._answered.is_set():
                    raise
                if self.inbox.state is not Stage.FAILED:
                    self._log.warning("the Prefill call failed after the handoff: %s", error)

    def _message(self) -> worker_pb2.PrefillRequest:
        """Its target is from the registry alone: nothing that a client says decides where KV goes."""
        target = worker_pb2.TransferTarget(
            worker_id=self._decode_on.id,
            address=self._decode_on.reported.hello.address,
            reservation_id=self.reservation.reservation_id,
            transport=self.transport,
            cached_tokens=self.reservation.cached_tokens,
        )
        fingerprint = self._prefill_on.reported.hello.model.fingerprint
        return worker_pb2.PrefillRequest(request=request_to_wire(self._request), target=target, fingerprint=fingerprint)

    async def _read(self, prefill: PrefillHold, decode: DecodeHold) -> None:
        over = False
        while (event := await prefill.next_event()) is not None:
            match event.WhichOneof("event"):
                case "started":
                    self.started = event.started
                    self._timeline.mark(Phase.PREFILL_STARTED)
                case "first_token":
                    prefill.computed()
                    over = self._note_first(event.first_token, decode)
                case "sealed":
                    self._decode_on.reported.prefixes.expect(self._spec.block_names)
                    self.inbox.put(event.sealed)
                    over = True
        if not over:
            raise InternalError(f"prefill worker {self.prefill_worker} ended its call without a seal")

    def _note_first(self, first: worker_pb2.FirstToken, decode: DecodeHold) -> bool:
        """True when it is the last one too."""
        self.first_ms = self._timeline.now_ms()
        self._mark_first(self.first_ms, first.compute_ms)
        reason = reason_from_wire(first.finish_reason)
        if reason in (FinishReason.ABORT, FinishReason.ERROR):
            raise Unavailable(f"the prefill worker ended the request ({reason}) and gave no cause")
        self.inbox.put(first)
        if self._request.sampling.max_tokens == 1:
            # No transfer began, whose abandoning would free the blocks: the client may take its time to read.
            decode.abort()
        return reason is not None

    def _mark_first(self, first_ms: float, compute_ms: float) -> None:
        """A short prompt is computed before its start is heard of: often both come at once.

        After a failed attempt the start is that of the one that gave the token; what was lost counts as queueing.
        """
        marks = self._timeline.marks
        if Phase.FIRST_TOKEN not in marks:
            started_ms = max(marks[Phase.RESERVED], first_ms - compute_ms)
            self._timeline.correct(Phase.PREFILL_STARTED, min(started_ms, first_ms))
        self._timeline.mark(Phase.FIRST_TOKEN, first_ms)
