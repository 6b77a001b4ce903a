"""One joined worker, as the router sees it: its last heartbeat, the connection to it, what is placed on it."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grpc

from router.aio import first_of
from router.placement import WorkerView
from router.pool.ledger import Ledger
from router.pool.pace import PrefillPace
from router.pool.prefix_index import PrefixIndex
from router.pool.subscriptions import Subscription
from tandem import errors, rpc, wire
from tandem.config import RouterConfig
from tandem.types import EngineRequest, Role
from tandem.v1 import registry_pb2, worker_pb2, worker_pb2_grpc

log = logging.getLogger(__name__)

# A worker that does not acknowledge an abort for this long is left to its leases and its own loss.
ABORT_TIMEOUT_S = 2.0
# Directives that may wait for a worker's stream.
MAX_DIRECTIVES = 16


class Worker:
    """A worker from its Join to its loss.

    joined ──dialled back, Subscribe accepted──▶ routable ──draining──▶ live requests only ──the last──▶ dismissed
       └───────────────┬───────────────────────────┴──────────────────────┘
                       ▼ a stream ended, heartbeats are silent, or the same process joined again
                     lost: no new work; live requests fail with WorkerLost; the channel is closed
    """

    def __init__(self, first: registry_pb2.Heartbeat, config: RouterConfig) -> None:
        hello = self.hello = first.hello
        # Its proof that a later Join is its own; in no status.
        self._instance = hello.instance
        hello.ClearField("instance")
        self.id = hello.worker_id
        self.model = wire.model_from_wire(hello.model)
        self.roles = wire.roles_from_wire(list(hello.roles))
        self.load = first.load
        self.heard_s = time.monotonic()
        self.routable = False
        self.queued, self.promised = Ledger(), Ledger()
        self.prefill_pace = PrefillPace()
        self.prefixes = PrefixIndex(hello.total_blocks if hello.prefix_cache else 0)
        self.prefixes.apply(wire.cache_changes_from_wire(first.prefix_cache))
        self.subscription = Subscription()
        # Reservations of live requests; their leases are renewed.
        self.leases: set[str] = set()
        self.directives: asyncio.Queue[registry_pb2.Directive] = asyncio.Queue(MAX_DIRECTIVES)
        # Why it was lost; None while it is not.
        self.loss: errors.TandemError | None = None
        self._lost = asyncio.Event()
        self._config = config
        self._drain_asked, self._drain_said, self._dismissed = False, first.draining, False
        self._live: dict[tuple[str, Role], Callable[[errors.TandemError], None]] = {}
        self._decode_wanted = asyncio.Event()
        self._aborts: set[asyncio.Task[None]] = set()
        self._channel = rpc.make_channel(hello.address, rpc.MAX_WORKER_MESSAGE_BYTES)
        self._prefill: Any = worker_pb2_grpc.PrefillWorkerStub(self._channel)
        self._decode: Any = worker_pb2_grpc.DecodeWorkerStub(self._channel)
        self._admin: Any = worker_pb2_grpc.WorkerAdminStub(self._channel)
        self._note_roles()

    # What is known about it.

    def is_same_process(self, hello: registry_pb2.Hello) -> bool:
        return bool(self._instance) and hmac.compare_digest(self._instance.encode(), hello.instance.encode())

    @property
    def draining(self) -> bool:
        return self._drain_asked or self._drain_said

    def takes(self, role: Role) -> bool:
        """Whether new work of the role may be placed on it."""
        return self.routable and not self.draining and role in self.roles

    @property
    def ready_roles(self) -> frozenset[Role]:
        """It decodes only while its token stream is open."""
        if not self.routable:
            return frozenset()
        return self.roles if self.subscription.is_open else self.roles - {Role.DECODE}

    def view(self, block_names: Sequence[bytes] = ()) -> WorkerView:
        """block_names: of the prompt that is to be placed."""
        return WorkerView(
            worker_id=self.id,
            roles=self.ready_roles,
            draining=self.draining,
            block_size=self.model.fingerprint.block_size,
            total_blocks=self.hello.total_blocks,
            free_blocks=self.load.free_blocks - self.promised.total,
            queued_prompt_tokens=self.load.queued_prompt_tokens + self.queued.total,
            live_requests=self.load.running_decodes
            + self.load.reservations
            + self.load.waiting_reservations
            + len(self.promised),
            cached_blocks=self.prefixes.leading(block_names),
            cache_size=len(self.prefixes),
        )

    def hear(self, heartbeat: registry_pb2.Heartbeat) -> None:
        """A hello in a later heartbeat says that the worker's roles have changed."""
        self.heard_s = time.monotonic()
        self.load = heartbeat.load
        self._drain_said = heartbeat.draining
        self.prefixes.apply(wire.cache_changes_from_wire(heartbeat.prefix_cache))
        self.queued.heartbeat(heartbeat.number)
        self.promised.heartbeat(heartbeat.number)
        if heartbeat.hello.roles:
            # Its roles alone: nothing else that it was admitted with can change.
            self.roles = wire.roles_from_wire(list(heartbeat.hello.roles))
            self._note_roles()
        self._dismiss_if_done()

    def _note_roles(self) -> None:
        if Role.DECODE in self.roles:
            self._decode_wanted.set()

    # What it is told on its Join stream.

    def drain(self) -> None:
        self._tell(registry_pb2.Directive(drain=registry_pb2.Drain()))
        self._drain_asked = True

    def set_roles(self, roles: frozenset[Role]) -> None:
        """A dropped role gets no new work from now on; a new one counts once the worker's hello names it."""
        self._tell(registry_pb2.Directive(set_roles=registry_pb2.SetRoles(roles=wire.roles_to_wire(roles))))
        self.roles &= roles

    def _dismiss_if_done(self) -> None:
        """A draining worker may leave once nothing depends on it: what was placed before it drained may come late."""
        if self._drain_said and not self._live and not self._dismissed:
            with contextlib.suppress(errors.Overloaded):  # the next heartbeat tries again
                self._tell(registry_pb2.Directive(dismiss=registry_pb2.Dismiss()))
                self._dismissed = True

    def _tell(self, directive: registry_pb2.Directive) -> None:
        try:
            self.directives.put_nowait(directive)
        except asyncio.QueueFull:
            raise errors.Overloaded(f"worker {self.id} has not taken its last {MAX_DIRECTIVES} directives") from None

    # The connection.

    async def serve(self) -> None:
        """Dials the announced address back and keeps the token stream. Runs until it is cancelled or raises."""
        await self._dial()
        if Role.DECODE not in self.roles:
            self._become_routable()
        await self._decode_wanted.wait()
        with self._streaming():
            try:
                await self.subscription.open(self._decode, self._config.heartbeat_timeout_s)
            except TimeoutError:
                raise errors.Unavailable(f"worker {self.id} did not accept Subscribe in time") from None
            self._become_routable()
            await first_of(self.subscription.pump(), self._renew_leases())

    async def _dial(self) -> None:
        try:
            async with asyncio.timeout(self._config.heartbeat_timeout_s):
                await self._channel.channel_ready()
        except TimeoutError:
            raise errors.Unavailable(f"the router cannot reach worker {self.id} at {self.hello.address}") from None

    def _become_routable(self) -> None:
        if not self.routable:
            self.routable = True
            log.info("worker %s is routable: %s at %s", self.id, "+".join(sorted(self.roles)), self.hello.address)

    async def _renew_leases(self) -> None:
        interval_s = self._config.lease_s / 3
        while True:
            await asyncio.sleep(interval_s)
            if self.leases:
                await self._renew(interval_s)

    async def _renew(self, timeout_s: float) -> None:
        request = worker_pb2.RenewRequest(
            reservation_ids=sorted(self.leases), lease_ms=round(self._config.lease_s * 1000)
        )
        try:
            await self._decode.Renew(request, timeout=timeout_s)
        except grpc.RpcError as error:
            # The next round may come through before the leases end; if none does, the worker ends the requests.
            log.warning("worker %s did not renew %d leases: %s", self.id, len(self.leases), rpc.error_from_rpc(error))

    async def wait_lost(self) -> None:
        """Raises the cause when the worker is lost."""
        await self._lost.wait()
        assert self.loss is not None
        raise self.loss

    def lose(self, cause: errors.TandemError) -> None:
        """Fails whatever is live on it. The first cause counts."""
        if self.loss is not None:
            return
        self.loss, self.routable = cause, False
        self._lost.set()
        live, self._live = self._live, {}
        for (_, role), fail in live.items():
            fail(self._lost_as(role))

    async def close(self) -> None:
        if self._aborts:
            await asyncio.wait(self._aborts, timeout=ABORT_TIMEOUT_S)
        await self._channel.close(None)

    # Live requests.

    def attach(self, request_id: str, role: Role, fail: Callable[[errors.TandemError], None]) -> None:
        """fail is called when the worker is lost before detach; until then a draining worker is not dismissed."""
        self._live[request_id, role] = fail

    def detach(self, request_id: str, role: Role) -> None:
        self._live.pop((request_id, role), None)
        self._dismiss_if_done()

    # Calls.

    @contextlib.contextmanager
    def calling(self, role: Role) -> Iterator[None]:
        """Around calls: what gRPC raises becomes a TandemError that names the worker in its role."""
        try:
            yield
        except grpc.RpcError as error:
            raise self._explain(error, role) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self.loss is not None and task is not None and not task.cancelling():
                # Nobody cancelled this task: the call was ended by the closing of the lost worker's channel.
                raise self._lost_as(role) from None
            raise

    @contextlib.contextmanager
    def _streaming(self) -> Iterator[None]:
        """Around the calls of `serve`, which belong to no request: what they raise is why the worker is lost."""
        try:
            yield
        except grpc.RpcError as error:
            if rpc.said_by_tandem(error):
                raise rpc.error_from_rpc(error) from None
            log.info("worker %s: its token stream broke: %s", self.id, rpc.error_from_rpc(error))
            raise errors.Unavailable("its token stream broke") from None

    def _explain(self, error: grpc.RpcError, role: Role) -> errors.TandemError:
        call: Any = error
        if rpc.said_by_tandem(error):
            return rpc.error_from_rpc(error)
        broken_off = call.code() is grpc.StatusCode.CANCELLED
        if call.code() is grpc.StatusCode.UNAVAILABLE or (broken_off and self.loss is not None):
            return errors.WorkerLost(f"{role} worker {self.id} was lost: {self.loss or call.details()}")
        if broken_off:
            # By its server's gRPC, not by its handler. As far as is known the call is over and the worker is not; if it
            # is on its way out, its registration ends next.
            log.warning("%s worker %s broke off a call", role, self.id)
            return errors.Unavailable(f"the {role} worker broke off the call; send the request again")
        if call.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return errors.DeadlineExceeded(f"the deadline passed while {role} worker {self.id} held the request")
        return rpc.error_from_rpc(error)

    def _lost_as(self, role: Role) -> errors.WorkerLost:
        return errors.WorkerLost(f"{role} worker {self.id} was lost: {self.loss}")

    async def reserve(self, request: EngineRequest, transport: str, timeout_s: float) -> worker_pb2.Reservation:
        """timeout_s: until the request's deadline."""
        message = worker_pb2.ReserveRequest(
            request=wire.request_to_wire(request),
            subscriber_id=self.subscription.id,
            lease_ms=round(self._config.lease_s * 1000),
            transport=transport,
            # 0 would mean that there is no deadline.
            deadline_ms=max(1, round(timeout_s * 1000)),
        )
        with self.calling(Role.DECODE):
            reservation: worker_pb2.Reservation = await self._decode.Reserve(message, timeout=timeout_s)
            return reservation

    def prefill(self, request: EngineRequest, target: worker_pb2.TransferTarget, timeout_s: float) -> Any:
        """The Prefill call, a stream of PrefillEvent; read it inside `calling`."""
        message = worker_pb2.PrefillRequest(
            request=wire.request_to_wire(request), target=target, fingerprint=self.hello.model.fingerprint
        )
        return self._prefill.Prefill(message, timeout=timeout_s)

    def embed(self, message: worker_pb2.EmbedPromptRequest, timeout_s: float) -> Any:
        """The Embed call; await it inside `calling`."""
        return self._prefill.Embed(message, timeout=timeout_s)

    def abort(self, request_id: str, attempt: int) -> asyncio.Task[None]:
        """Starts Abort. The task ends in bounded time, never fails, and goes on when its waiter is cancelled."""
        task = asyncio.create_task(self._abort(request_id, attempt))
        self._aborts.add(task)
        task.add_done_callback(self._aborts.discard)
        return task

    async def _abort(self, request_id: str, attempt: int) -> None:
        if self.loss is not None:
            return
        message = worker_pb2.AbortRequest(request_id=request_id, attempt=attempt)
        try:
            with self.calling(Role.DECODE):
                await self._decode.Abort(message, timeout=ABORT_TIMEOUT_S)
        except errors.TandemError as error:
            log.warning("abort on worker %s failed: %s", self.id, error, extra={"request_id": request_id})

    async def check_integrity(self, timeout_s: float) -> registry_pb2.Integrity:
        """A worker that cannot answer is not ok."""
        try:
            answer: registry_pb2.Integrity = await self._admin.CheckIntegrity(
                worker_pb2.CheckIntegrityRequest(), timeout=timeout_s
            )
        except grpc.RpcError as error:
            return registry_pb2.Integrity(problem=f"no answer: {rpc.error_from_rpc(error)}")
        return answer
