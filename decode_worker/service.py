"""The decode role of a worker: reserves blocks, receives KV into them, decodes, streams tokens."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import grpc

from decode_worker.aborted import Aborted
from decode_worker.order import Order
from decode_worker.reservations import Reservation
from decode_worker.reserve_queue import ReserveQueue
from decode_worker.subscriptions import Subscription
from kv_transfer.admission import Claims
from kv_transfer.plasma import Plasma
from kv_transfer.service import KVService
from kv_transfer.shared_memory import SharedMemory
from tandem.errors import Refused, TransferFailed, Unavailable
from tandem.process import logs
from tandem.types import EngineRequest, Fingerprint, Role
from tandem.v1 import registry_pb2, worker_pb2, worker_pb2_grpc
from tandem.worker.host import WorkerHost

log = logging.getLogger(__name__)


class DecodeRoom(worker_pb2_grpc.DecodeWorkerServicer):
    """tandem.v1.DecodeWorker, and the kv_transfer Landings of this worker."""

    role = Role.DECODE
    service = "tandem.v1.DecodeWorker"

    def __init__(
        self,
        host: WorkerHost,
        claims: Claims | None = None,
        plasma: Plasma | None = None,
        memory: SharedMemory | None = None,
    ) -> None:
        """claims: shared with this worker's other transports, so that two never meet in a reservation.

        plasma: KV may come through Ray's object store too. memory: the engine's pool lies there, for senders to write.
        """
        self._host = host
        self._queue = ReserveQueue(host)
        self._by_id: dict[str, Reservation] = {}
        self._by_request: dict[str, Reservation] = {}
        self._aborted = Aborted()
        self._subscriptions: dict[str, Subscription] = {}
        # Reserve calls that are being read, or wait for blocks.
        self._reserving = 0
        self._kv = KVService(self, host.config, claims, plasma, memory)
        host.when_idle_for_good(self._hang_up)

    # Room

    def attach(self, server: grpc.aio.Server) -> None:
        worker_pb2_grpc.add_DecodeWorkerServicer_to_server(self, server)
        server.add_generic_rpc_handlers((self._kv,))

    def report(self, load: registry_pb2.Load) -> None:
        load.reservations = len(self._by_id)
        load.waiting_reservations = len(self._queue)
        for name, counters in self._kv.counters.items():
            load.kv_received[name].CopyFrom(counters.as_wire())

    @property
    def busy(self) -> bool:
        return bool(self._by_id) or self._reserving > 0

    async def aclose(self) -> None:
        for reservation in list(self._by_id.values()):
            reservation.end()
        await self._kv.aclose()

    # Landings

    @property
    def fingerprint(self) -> Fingerprint:
        return self._host.engine.fingerprint

    def find(self, reservation_id: str) -> Reservation:
        """Raises TransferFailed for an id that was never made or is over. Ids are 128 random bits: a dict look-up
        tells a guesser nothing useful."""
        reservation = self._by_id.get(reservation_id)
        if reservation is None:
            raise TransferFailed("no such reservation: it never was, or it is over")
        return reservation

    # gRPC

    async def Reserve(self, message: worker_pb2.ReserveRequest, context: Any) -> worker_pb2.Reservation:
        self._host.require(Role.DECODE)
        logs.about(message.request.request_id)
        self._reserving += 1
        try:
            return await self._reserve(message, context)
        finally:
            self._reserving -= 1

    async def _reserve(self, message: worker_pb2.ReserveRequest, context: Any) -> worker_pb2.Reservation:
        order = await self._order(message)
        self._aborted.check(order.request)
        self._end_older(order.request)
        started = time.monotonic()
        table = await self._queue.acquire(order)
        subscription = self._subscriptions.get(message.subscriber_id)
        if subscription is None or context.cancelled():
            table.release()
            raise Refused("no such subscription: subscribe before reserving")
        reservation = Reservation(self._host, order, table, subscription.put, self._forget)
        self._by_id[reservation.id] = self._by_request[reservation.request_id] = reservation
        self._host.promises[reservation.id] = reservation
        log.debug("reserved: %d of %d prompt tokens are cached", table.cached_tokens, len(order.request.prompt_ids))
        queued_ms = (time.monotonic() - started) * 1000
        return worker_pb2.Reservation(
            reservation_id=reservation.id,
            cached_tokens=table.cached_tokens,
            queued_ms=queued_ms,
            counted_from=self._host.next_heartbeat,
        )

    async def _order(self, message: worker_pb2.ReserveRequest) -> Order:
        """Raises InvalidRequest, or Refused for KV that cannot come."""
        arrived = asyncio.get_running_loop().time()
        local = message.transport == "local" and Role.PREFILL in self._host.roles
        if not local and message.transport not in self._kv.counters:
            raise Refused(f"this worker cannot take KV by {message.transport[:20]!r}")
        request = await self._host.read(message.request)
        return Order(
            request=request,
            block_names=await self._host.name_blocks(request),
            subscriber_id=message.subscriber_id,
            local=local,
            lease_s=message.lease_ms / 1000,
            deadline=arrived + message.deadline_ms / 1000 if message.deadline_ms else None,
        )

    async def Renew(self, message: worker_pb2.RenewRequest, context: Any) -> worker_pb2.RenewResponse:
        for reservation_id in message.reservation_ids:
            reservation = self._by_id.get(reservation_id)
            if reservation is not None:
                reservation.renew(message.lease_ms / 1000)
        return worker_pb2.RenewResponse()

    async def Abort(self, message: worker_pb2.AbortRequest, context: Any) -> worker_pb2.AbortResponse:
        logs.about(message.request_id)
        self._aborted.note(message.request_id, message.attempt)
        cause = Unavailable("the request was aborted on its decode worker")
        self._queue.turn_away(message.request_id, message.attempt, cause)
        reservation = self._by_request.get(message.request_id)
        if reservation is not None and reservation.attempt <= message.attempt:
            # Its router listens no more, if the Abort is its own; if not, it must hear that nothing comes.
            reservation.fail(cause)
        return worker_pb2.AbortResponse()

    async def Subscribe(self, message: worker_pb2.SubscribeRequest, context: Any) -> None:
        if message.subscriber_id in self._subscriptions or not message.subscriber_id:
            raise Refused("the subscriber id is empty or in use")
        subscription = self._subscriptions[message.subscriber_id] = Subscription()
        try:
            await context.send_initial_metadata(())
            while (batch := await subscription.next_batch()) is not None:
                await context.write(batch)
        finally:
            del self._subscriptions[message.subscriber_id]
            self._end_all_of(message.subscriber_id)

    def _end_older(self, request: EngineRequest) -> None:
        """A new attempt replaces an older one; an attempt that is not newer is stale. Raises Refused then."""
        name, existing = request.request_id, self._by_request.get(request.request_id)
        newest = self._queue.newest_attempt(name) if existing is None else existing.attempt
        if newest is None:
            return
        if newest >= request.attempt:
            raise Refused(f"request {name} has attempt {newest} here already")
        self._queue.turn_away(name, newest, Refused(f"attempt {request.attempt} of request {name} replaces this one"))
        if existing is not None:
            existing.end()

    def _hang_up(self) -> None:
        for subscription in self._subscriptions.values():
            subscription.close()

    def _end_all_of(self, subscriber_id: str) -> None:
        gone = [r for r in self._by_id.values() if r.subscriber_id == subscriber_id]
        for reservation in gone:
            logs.of_request(__name__, reservation.request_id).warning("aborted: its router's token stream ended")
            reservation.end()

    def _forget(self, reservation: Reservation) -> None:
        log.debug("its reservation is over", extra={"request_id": reservation.request_id})
        del self._by_id[reservation.id]
        del self._host.promises[reservation.id]
        if self._by_request.get(reservation.request_id) is reservation:
            del self._by_request[reservation.request_id]
