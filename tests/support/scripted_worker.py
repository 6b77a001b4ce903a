"""A worker without a model: a real gRPC server in the pool, whose every phase a test can hold or fail."""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from scripted_member import ScriptedMember

from tandem import rpc, wire
from tandem.errors import TandemError
from tandem.types import FinishReason, Role
from tandem.v1 import common_pb2, registry_pb2, worker_pb2, worker_pb2_grpc

# Where a test can hold a request or make it fail.
PHASES = ("reserve", "start", "first", "seal", "decode", "rest", "embed")
# What a prefill is said to have taken, and has not.
COMPUTE_MS = 0.5


async def eventually(condition: Callable[[], Any], timeout_s: float = 5.0) -> None:
    """Returns once the condition holds."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        await asyncio.sleep(0.003)


class Cluster:
    """The scripted workers of one test, and what happened on them, in order."""

    def __init__(self, router: str) -> None:
        self.router = router
        self.workers: dict[str, ScriptedWorker] = {}
        # (worker id, what, request id)
        self.log: list[tuple[str, str, str]] = []
        # What the model says, one id after another; it goes on to max_tokens with token 5.
        self.output: list[int] = []
        # Log probabilities that ride on every token.
        self.top_logprobs = 0
        # Reason of the end of `output`; None: it goes on.
        self.reason: FinishReason | None = None

    def happened(self, what: str, worker_id: str | None = None) -> list[str]:
        """Request ids."""
        return [entry[2] for entry in self.log if entry[1] == what and worker_id in (None, entry[0])]

    async def saw(self, what: str, times: int = 1) -> None:
        await eventually(lambda: len(self.happened(what)) >= times)

    def token(self, position: int) -> int:
        return self.output[position] if position < len(self.output) else 5

    def wire_token(self, token_id: int) -> common_pb2.Token:
        top = [common_pb2.TokenLogprob(token_id=rank, logprob=-1.0) for rank in range(self.top_logprobs)]
        return common_pb2.Token(id=token_id, top_logprobs=top)

    def reason_at(self, position: int, max_tokens: int) -> FinishReason | None:
        if self.reason is not None and position == len(self.output) - 1:
            return self.reason
        return FinishReason.LENGTH if position == max_tokens - 1 else None

    @asynccontextmanager
    async def worker(
        self, worker_id: str, roles: Sequence[Role] = (Role.PREFILL, Role.DECODE), **changes: Any
    ) -> AsyncIterator[ScriptedWorker]:
        worker = self.workers[worker_id] = ScriptedWorker(self, worker_id, roles, **changes)
        await worker.start()
        try:
            yield worker
        finally:
            await worker.kill()


class ScriptedWorker(
    ScriptedMember,
    worker_pb2_grpc.PrefillWorkerServicer,
    worker_pb2_grpc.DecodeWorkerServicer,
    worker_pb2_grpc.WorkerAdminServicer,
):
    def __init__(self, cluster: Cluster, worker_id: str, roles: Sequence[Role], **changes: Any) -> None:
        """changes: see ScriptedMember."""
        super().__init__(cluster.router, worker_id, roles, **changes)
        self.cluster = cluster
        # Cleared: requests wait there.
        self.gates = {phase: asyncio.Event() for phase in PHASES}
        # By phase, and "integrity".
        self.errors: dict[str, TandemError] = {}
        # By phase: raised once.
        self.faults: dict[str, TandemError] = {}
        self.reserve_requests: list[worker_pb2.ReserveRequest] = []
        self.prefill_requests: list[worker_pb2.PrefillRequest] = []
        self.embed_requests: list[worker_pb2.EmbedPromptRequest] = []
        self.renewed: list[list[str]] = []
        self.steps_per_batch = 1
        self.integrity = registry_pb2.Integrity(ok=True)
        self._queues: dict[str, asyncio.Queue[worker_pb2.TokenBatch | None]] = {}
        self._reservations: dict[str, worker_pb2.ReserveRequest] = {}
        self._decodes: dict[str, asyncio.Task[None]] = {}
        for gate in self.gates.values():
            gate.set()

    def hold(self, phase: str) -> None:
        self.gates[phase].clear()

    def let(self, phase: str) -> None:
        self.gates[phase].set()

    @property
    def held_requests(self) -> int:
        """Reservations and decodes that nobody has ended: must be 0 when nothing is live (law 3)."""
        return len(self._reservations) + len(self._decodes)

    @property
    def subscribed(self) -> bool:
        return bool(self._queues)

    async def start(self) -> None:
        self.server = rpc.make_server()
        worker_pb2_grpc.add_PrefillWorkerServicer_to_server(self, self.server)
        worker_pb2_grpc.add_DecodeWorkerServicer_to_server(self, self.server)
        worker_pb2_grpc.add_WorkerAdminServicer_to_server(self, self.server)
        port = rpc.bind(self.server, "127.0.0.1", 0)
        await self.server.start()
        self.open(port)

    async def kill(self) -> None:
        """As a process that dies: nothing is said to anybody."""
        await self.close()
        for task in self._decodes.values():
            task.cancel()
        await self.server.stop(0)

    # Serving.

    def note(self, what: str, request_id: str) -> None:
        self.cluster.log.append((self.id, what, request_id))

    async def reach(self, phase: str, request_id: str) -> None:
        self.note(phase, request_id)
        await self.gates[phase].wait()
        if phase in self.faults:
            raise self.faults.pop(phase)
        if phase in self.errors:
            raise self.errors[phase]

    async def Reserve(self, request: worker_pb2.ReserveRequest, context: Any) -> worker_pb2.Reservation:
        self.reserve_requests.append(request)
        try:
            await self.reach("reserve", request.request.request_id)
        except asyncio.CancelledError:
            self.note("reserve_cancelled", request.request.request_id)
            raise
        reservation_id = f"reservation-{request.request.request_id}"
        self._reservations[reservation_id] = request
        return worker_pb2.Reservation(reservation_id=reservation_id, cached_tokens=1, counted_from=self.next_heartbeat)

    async def Renew(self, request: worker_pb2.RenewRequest, context: Any) -> worker_pb2.RenewResponse:
        self.renewed.append(list(request.reservation_ids))
        return worker_pb2.RenewResponse()

    async def Subscribe(self, request: worker_pb2.SubscribeRequest, context: Any) -> None:
        queue = self._queues[request.subscriber_id] = asyncio.Queue()
        await context.send_initial_metadata(())
        try:
            while (batch := await queue.get()) is not None:
                await context.write(batch)
        finally:
            del self._queues[request.subscriber_id]

    def end_subscriptions(self) -> None:
        for queue in self._queues.values():
            queue.put_nowait(None)

    async def Abort(self, request: worker_pb2.AbortRequest, context: Any) -> worker_pb2.AbortResponse:
        self.note("abort", request.request_id)
        self._reservations.pop(f"reservation-{request.request_id}", None)
        decode = self._decodes.pop(request.request_id, None)
        if decode is not None:
            decode.cancel()
        return worker_pb2.AbortResponse()

    async def CheckIntegrity(self, request: Any, context: Any) -> registry_pb2.Integrity:
        if "integrity" in self.errors:
            raise self.errors["integrity"]
        return self.integrity

    async def Prefill(self, request: worker_pb2.PrefillRequest, context: Any) -> None:
        self.prefill_requests.append(request)
        request_id = request.request.request_id
        try:
            await self.run_prefill(request, request_id, context)
            self.note("prefill_done", request_id)
        except asyncio.CancelledError:
            self.note("prefill_cancelled", request_id)
            raise

    async def run_prefill(self, request: worker_pb2.PrefillRequest, request_id: str, context: Any) -> None:
        await rpc.say_counted_from(context, self.next_heartbeat)
        await self.reach("start", request_id)
        started = worker_pb2.PrefillStarted(queued_ms=1, cached_tokens=2)
        await context.write(worker_pb2.PrefillEvent(started=started))
        await self.reach("first", request_id)
        reason = self.cluster.reason_at(0, request.request.sampling.max_tokens)
        token = self.cluster.wire_token(self.cluster.token(0))
        first = worker_pb2.FirstToken(token=token, finish_reason=wire.reason_to_wire(reason), compute_ms=COMPUTE_MS)
        await context.write(worker_pb2.PrefillEvent(first_token=first))
        if reason is not None:
            return
        await self.reach("seal", request_id)
        self.cluster.workers[request.target.worker_id].seal(request.target.reservation_id)
        summary = worker_pb2.TransferSummary(bytes=1000, frames=3, transfer_ms=0.5)
        sealed = worker_pb2.Sealed(summary=summary, after_first_token_ms=0.25)
        await context.write(worker_pb2.PrefillEvent(sealed=sealed))

    async def Embed(self, request: worker_pb2.EmbedPromptRequest, context: Any) -> worker_pb2.EmbedPromptResponse:
        """The vector of a prompt is its first token and its length."""
        self.embed_requests.append(request)
        await rpc.say_counted_from(context, self.next_heartbeat)
        try:
            await self.reach("embed", request.request_id)
        except asyncio.CancelledError:
            self.note("embed_cancelled", request.request_id)
            raise
        self.note("embed_done", request.request_id)
        vector = struct.pack("<2f", request.prompt_ids[0], len(request.prompt_ids))
        return worker_pb2.EmbedPromptResponse(values=vector, cached_tokens=1)

    # Decoding.

    def seal(self, reservation_id: str) -> None:
        request = self._reservations.pop(reservation_id)
        request_id = request.request.request_id
        self._decodes[request_id] = asyncio.create_task(self._decode(request, request_id))

    def drop_decode(self, request_id: str) -> None:
        """Tells no more of it."""
        self._decodes.pop(request_id).cancel()

    async def _decode(self, request: worker_pb2.ReserveRequest, request_id: str) -> None:
        try:
            await self.reach("decode", request_id)
            await self._decode_tokens(request, request_id)
        except TandemError as error:
            failure, attempt = wire.failure_to_wire(error), request.request.attempt
            self.send(request.subscriber_id, request_id, 1, [], FinishReason.ERROR, failure, attempt)
        self._decodes.pop(request_id, None)

    async def _decode_tokens(self, request: worker_pb2.ReserveRequest, request_id: str) -> None:
        position, reason, limit = 1, None, request.request.sampling.max_tokens
        while reason is None:
            ids: list[int] = []
            while len(ids) < self.steps_per_batch and reason is None:
                ids.append(self.cluster.token(position + len(ids)))
                reason = self.cluster.reason_at(position + len(ids) - 1, limit)
            self.send(request.subscriber_id, request_id, position, ids, reason, attempt=request.request.attempt)
            position += len(ids)
            await asyncio.sleep(0)
            await self.gates["rest"].wait()

    def send(
        self,
        subscriber_id: str,
        request_id: str,
        position: int,
        ids: Sequence[int],
        reason: FinishReason | None = None,
        failure: common_pb2.Failure | None = None,
        attempt: int = 0,
    ) -> None:
        message = worker_pb2.RequestTokens(
            request_id=request_id,
            attempt=attempt,
            position=position,
            tokens=[self.cluster.wire_token(id_) for id_ in ids],
            finish_reason=wire.reason_to_wire(reason),
            failure=failure,
            decode_gap_ms=0.5 if position == 1 else None,
        )
        if subscriber_id in self._queues:
            self._queues[subscriber_id].put_nowait(worker_pb2.TokenBatch(requests=[message]))
