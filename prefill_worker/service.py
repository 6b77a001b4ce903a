"""The prefill role of a worker: computes prompts, samples first tokens, moves the KV to whoever decodes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from kv_transfer.base import TransferTarget, Transport
from kv_transfer.carriers.local.carrier import LocalTransport
from kv_transfer.ends.transport import transports_of
from prefill_worker.call import PrefillCall
from prefill_worker.embedding import embed
from tandem.engine.sequence import EngineEvent, Sequence
from tandem.errors import Refused
from tandem.process import logs
from tandem.v1 import registry_pb2, worker_pb2, worker_pb2_grpc
from tandem.worker.host import WorkerHost

log = logging.getLogger(__name__)


class PrefillService(worker_pb2_grpc.PrefillWorkerServicer):
    """tandem.v1.PrefillWorker."""

    name = "tandem.v1.PrefillWorker"

    def __init__(self, host: WorkerHost) -> None:
        # By name; this worker's own decode role is reached by the first.
        self.transports: dict[str, Transport] = {
            LocalTransport.name: LocalTransport(host.reservations),
            **transports_of(host.carriers),
        }
        self._host = host
        # Calls under way.
        self._live = 0

    # RoleService

    def add_to_server(self, server: grpc.aio.Server) -> None:
        worker_pb2_grpc.add_PrefillWorkerServicer_to_server(self, server)

    def report_load(self, load: registry_pb2.Load) -> None:
        for name, transport in self.transports.items():
            if name != LocalTransport.name:
                load.kv_sent[name].CopyFrom(transport.counters.as_wire())

    @property
    def busy(self) -> bool:
        return self._live > 0

    def close_streams(self) -> None:
        """See RoleService. A call here lasts as long as its request."""

    async def aclose(self) -> None:
        for transport in self.transports.values():
            await transport.aclose()

    # gRPC

    async def Prefill(self, message: worker_pb2.PrefillRequest, context: Any) -> None:
        with self._call(message.request.request_id):
            prefill = await self._prepare(message, context)
            log.debug("prefill begins: %d tokens", len(message.request.prompt_ids))
            await prefill.run()
            log.debug("prefill is over")

    async def Embed(self, message: worker_pb2.EmbedPromptRequest, context: Any) -> worker_pb2.EmbedPromptResponse:
        with self._call(message.request_id):
            return await embed(self._host, message, context)

    @contextmanager
    def _call(self, request_id: str) -> Iterator[None]:
        """Around a call, which counts as live."""
        logs.about(request_id)
        self._live += 1
        try:
            yield
        finally:
            self._live -= 1

    async def _prepare(self, message: worker_pb2.PrefillRequest, context: Any) -> PrefillCall:
        """Raises InvalidRequest; Refused or TransferFailed for a target that it cannot reach."""
        host, reservation_id = self._host, message.target.reservation_id
        request = await host.read(message.request)
        fingerprint = host.require_fingerprint(message.fingerprint, "model or KV layout")
        transport = self.transports.get(message.target.transport)
        if transport is None:
            raise Refused(f"this worker has no transport {message.target.transport!r}")
        target = TransferTarget(
            reservation_id=reservation_id,
            request_id=request.request_id,
            attempt=request.attempt,
            address=message.target.address,
            cached_tokens=message.target.cached_tokens,
            prompt_tokens=len(request.prompt_ids),
            fingerprint=fingerprint,
            deadline_s=context.time_remaining(),
        )
        events: asyncio.Queue[EngineEvent] = asyncio.Queue()
        if transport.name == LocalTransport.name:
            reservation = host.reservations.find_local(reservation_id, request)
            sequence = reservation.lend(events.put_nowait)
            return PrefillCall(host, sequence, events, transport, target, context, reservation)
        names = await host.name_blocks(request)
        sequence = Sequence(request, events.put_nowait, decode_here=False, prompt_names=names)
        return PrefillCall(host, sequence, events, transport, target, context)
