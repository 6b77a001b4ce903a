"""How the service stands now, in the words of the Generation service."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import tandem
from router.life.request import Live, Orchestrator
from router.pool.registry import Registry
from router.pool.worker import Worker
from tandem.v1 import generation_pb2, registry_pb2
from tandem.wire import model_to_wire, roles_to_wire

# Entries in one Status answer.
MAX_LISTED_REQUESTS = 100
INTEGRITY_TIMEOUT_S = 5.0


class StatusReport:
    """What Status and ListModels tell."""

    def __init__(self, orchestrator: Orchestrator, registry: Registry, http_port: int) -> None:
        """http_port: of the other door; 0 when there is none."""
        self._orchestrator = orchestrator
        self._registry = registry
        self._http_port = http_port
        self._started_s = time.monotonic()

    def models(self) -> list[registry_pb2.ModelInfo]:
        model = self._registry.model
        return [] if model is None else [model_to_wire(model)]

    async def now(self, check_integrity: bool) -> generation_pb2.StatusResponse:
        # One that is not dialled back yet gets no requests: it does not count as there.
        workers = [worker for worker in self._registry.workers if worker.routable]
        checks: Sequence[registry_pb2.Integrity | None] = [None] * len(workers)
        if check_integrity:
            checks = await asyncio.gather(*(worker.link.check_integrity(INTEGRITY_TIMEOUT_S) for worker in workers))
        live = self._orchestrator.live
        return generation_pb2.StatusResponse(
            version=tandem.__version__,
            uptime_ms=(time.monotonic() - self._started_s) * 1000,
            live_requests=len(live),
            finished_requests=self._orchestrator.finished,
            failed_requests=self._orchestrator.failed,
            cancelled_requests=self._orchestrator.cancelled,
            workers=[_worker_status(worker, check) for worker, check in zip(workers, checks, strict=True)],
            models=self.models(),
            requests=[_live_request(entry) for entry in live[:MAX_LISTED_REQUESTS]],
            http_port=self._http_port,
        )


def _worker_status(worker: Worker, check: registry_pb2.Integrity | None) -> generation_pb2.WorkerStatus:
    status = generation_pb2.WorkerStatus(
        hello=worker.reported.hello,
        load=worker.load,
        heartbeat_age_ms=(time.monotonic() - worker.reported.at_s) * 1000,
        draining=worker.draining,
        integrity=check,
        cached_blocks=len(worker.reported.prefixes),
    )
    # Roles may have changed since the hello.
    status.hello.roles[:] = roles_to_wire(worker.ready_roles)
    return status


def _live_request(live: Live) -> generation_pb2.LiveRequest:
    """The first of n choices stands for the request."""
    job = live.jobs[0]
    return generation_pb2.LiveRequest(
        request_id=live.request_id,
        phase=job.phase,
        age_ms=live.timeline.now_ms(),
        prefill_worker=job.prefill_worker,
        decode_worker=job.decode_worker,
    )
