"""The decode role of a worker: reserves blocks, receives KV into them, decodes, streams tokens."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import grpc

from decode_worker.reserve_queue import AbortedAttempts, ReserveQueue
from decode_worker.token_stream import TokenStream
from kv_transfer.ends.service import KVService
from tandem.errors import Refused, Unavailable
from tandem.process import logs
from tandem.types import EngineRequest, Role
from tandem.v1 import registry_pb2, worker_pb2, worker_pb2_grpc
from tandem.worker.host import WorkerHost
from tandem.worker.reservation import ReserveOrder

log = logging.getLogger(__name__)


class DecodeService(worker_pb2_grpc.DecodeWorkerServicer):
    """tandem.v1.DecodeWorker.

    Reserve makes a reservation (tandem/worker/reservation.py), which goes its way by itself: KV arrives, the engine
    decodes, tokens leave on the stream of the router that subscribed.
    """

    name = "tandem.v1.DecodeWorker"

    def __init__(self, host: WorkerHost) -> None:
        self._host = host
        self._reservations = host.reservations
        self._queue = ReserveQueue(host)
        self._aborted = AbortedAttempts()
        # By subscriber id.
        self._streams: dict[str, TokenStream] = {}
        # Reserve calls that are being read, or wait for blocks.
        self._reserving = 0
        self._kv = KVService(host.reservations, host.config, host.carriers)

    # RoleService

    def add_to_server(self, server: grpc.aio.Server) -> None:
        worker_pb2_grpc.add_DecodeWorkerServicer_to_server(self, server)
        server.add_generic_rpc_handlers((self._kv,))

    def report_load(self, load: registry_pb2.Load) -> None:
        load.waiting_reservations = len(self._queue)
        for name, counters in self._kv.counters.items():
            load.kv_received[name].CopyFrom(counters.as_wire())

    @property
    def busy(self) -> bool:
        return self._reserving > 0

    def close_streams(self) -> None:
        for stream in self._streams.values():
            stream.close()

    async def aclose(self) -> None:
        for reservation in list(self._reservations.values()):
            reservation.end()
        await self._kv.aclose()

    # gRPC

    async def Reserve(self, message: worker_pb2.ReserveRequest, context: Any) -> worker_pb2.Reservation:
        logs.about(message.request.request_id)
        self._reserving += 1
        try:
            order = await self._read(message)
            self._aborted.check(order.request)
            self._end_older(order.request)
            started = time.monotonic()
            table = await self._queue.acquire(order)
            stream = self._streams.get(message.subscriber_id)
            if stream is None or context.cancelled():
                table.release()
                raise Refused("no such subscription: subscribe before reserving")
            reservation = self._reservations.make(order, table, stream.put)
            log.debug("reserved: %d of %d prompt tokens are cached", table.cached_tokens, len(order.request.prompt_ids))
            return worker_pb2.Reservation(
                reservation_id=reservation.id,
                cached_tokens=table.cached_tokens,
                queued_ms=(time.monotonic() - started) * 1000,
                counted_from=self._host.next_heartbeat,
            )
        finally:
            self._reserving -= 1

    async def _read(self, message: worker_pb2.ReserveRequest) -> ReserveOrder:
        """Raises InvalidRequest, or Refused for KV that cannot come."""
        arrived = asyncio.get_running_loop().time()
        local = message.transport == "local" and Role.PREFILL in self._host.roles
        if not local and message.transport not in self._kv.counters:
            raise Refused(f"this worker cannot take KV by {message.transport[:20]!r}")
        request = await self._host.read(message.request)
        return ReserveOrder(
            request=request,
            block_names=await self._host.name_blocks(request),
            subscriber_id=message.subscriber_id,
            local=local,
            lease_s=message.lease_ms / 1000,
            deadline=arrived + message.deadline_ms / 1000 if message.deadline_ms else None,
        )

    def _end_older(self, request: EngineRequest) -> None:
        """A new attempt replaces an older one; an attempt that is not newer is stale. Raises Refused then."""
        name, existing = request.request_id, self._reservations.of_request(request.request_id)
        newest = self._queue.newest_attempt(name) if existing is None else existing.attempt
        if newest is None:
            return
        if newest >= request.attempt:
            raise Refused(f"request {name} has attempt {newest} here already")
        self._queue.reject(name, newest, Refused(f"attempt {request.attempt} of request {name} replaces this one"))
        if existing is not None:
            existing.end()

    async def Renew(self, message: worker_pb2.RenewRequest, context: Any) -> worker_pb2.RenewResponse:
        for reservation_id in message.reservation_ids:
            if reservation := self._reservations.get(reservation_id):
                reservation.renew(message.lease_ms / 1000)
        return worker_pb2.RenewResponse()

    async def Abort(self, message: worker_pb2.AbortRequest, context: Any) -> worker_pb2.AbortResponse:
        logs.about(message.request_id)
        self._aborted.note(message.request_id, message.attempt)
        cause = Unavailable("the request was aborted on its decode worker")
        self._queue.reject(message.request_id, message.attempt, cause)
        reservation = self._reservations.of_request(message.request_id)
        if reservation is not None and reservation.attempt <= message.attempt:
            # Its router listens no more, if the Abort is its own; if not, it must hear that nothing comes.
            reservation.fail(cause)
        return worker_pb2.AbortResponse()

    async def Subscribe(self, message: worker_pb2.SubscribeRequest, context: Any) -> None:
        subscriber_id = message.subscriber_id
        if subscriber_id in self._streams or not subscriber_id:
            raise Refused("the subscriber id is empty or in use")
        stream = self._streams[subscriber_id] = TokenStream()
        try:
            await context.send_initial_metadata(())
            while (batch := await stream.next_batch()) is not None:
                await context.write(batch)
        finally:
            del self._streams[subscriber_id]
            for reservation in list(self._reservations.values()):
                if reservation.order.subscriber_id == subscriber_id:
                    name = reservation.request_id
                    logs.of_request(__name__, name).warning("aborted: its router's token stream ended")
                    reservation.end()
