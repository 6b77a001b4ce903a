"""A router that is killed or frozen: its workers free what it asked for, by themselves."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from service import Service, stop_all, wait_until

import tandem
from tandem import rpc
from tandem.client.status import WorkerState
from tandem.config import TINY_MODEL
from tandem.errors import TandemError
from tandem.v1 import registry_pb2, worker_pb2, worker_pb2_grpc

REQUESTS, LEASE_S = 16, 1.0


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    """Without the check of integrity through the router, which is not there at the end."""
    sections: dict[str, dict[str, Any]] = {
        "model": {"path": str(TINY_MODEL)},
        "engine": {"kv_memory_mib": 128, "threads": 1},
        "worker": {},
        "router": {"lease_s": LEASE_S},
    }
    service = Service(tmp_path, sections)
    try:
        service.start_worker("prefill-0", "prefill")
        service.start_worker("decode-0", "decode")
        service.wait_joined(2)
        yield service
    finally:
        service.client.close()
        stop_all(service.processes.values())


def ask(address: str) -> None:
    with contextlib.suppress(TandemError), tandem.Client(address) as client:
        client.complete(list(os.urandom(10)), max_tokens=1900, ignore_eos=True)


def integrity(worker: WorkerState) -> registry_pb2.Integrity:
    with rpc.grpc.insecure_channel(worker.address) as channel:
        answer: registry_pb2.Integrity = worker_pb2_grpc.WorkerAdminStub(channel).CheckIntegrity(
            worker_pb2.CheckIntegrityRequest(), timeout=5
        )
    return answer


def idle(worker: WorkerState) -> bool:
    found = integrity(worker)
    assert found.ok
    return (found.referenced_blocks, found.reservations, found.live_sequences) == (0, 0, 0)


@pytest.mark.parametrize(("signum", "within_s"), [(signal.SIGKILL, 1.0), (signal.SIGSTOP, 2 * LEASE_S)])
def test_the_requests_of_a_lost_router_are_freed(service: Service, signum: signal.Signals, within_s: float) -> None:
    """Killed: its token stream ends. Frozen: its connections stand, but nobody renews the leases."""
    workers = service.status().workers
    with ThreadPoolExecutor(REQUESTS) as threads:
        for _ in range(REQUESTS):
            threads.submit(ask, service.address)
        wait_until(lambda: max(integrity(worker).live_sequences for worker in workers) == REQUESTS, what="decoding")
        service.router.send(signum)
        try:
            wait_until(lambda: all(map(idle, workers)), within_s, "both workers free")
        finally:
            service.router.send(signal.SIGKILL)
