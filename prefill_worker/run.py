"""A process that plays the prefill role only."""

from __future__ import annotations

from kv_transfer.base import Transport
from kv_transfer.grpc_transport import GrpcTransport
from kv_transfer.nixl_agent import announcement as nixl_announcement
from kv_transfer.nixl_agent import check_devices
from kv_transfer.nixl_transport import NixlTransport
from kv_transfer.service import MAX_MESSAGE_BYTES
from kv_transfer.shared_memory import announcement, shared_memory
from kv_transfer.shm_transport import ShmTransport
from prefill_worker.service import PrefillRoom
from tandem.config import TandemConfig
from tandem.types import Role
from tandem.worker.host import Room, WorkerHost
from tandem.worker.main import WorkerKind, run_rooms


def run(config: TandemConfig, router: str) -> int:
    """Until SIGTERM; returns the exit code."""
    kind = WorkerKind(frozenset({Role.PREFILL}), _rooms, MAX_MESSAGE_BYTES, check_devices=check_devices)
    return run_rooms(kind, config, router)


def _rooms(host: WorkerHost) -> list[Room]:
    transports: dict[str, Transport] = {"grpc": GrpcTransport(host.config)}
    if shared_memory() is not None:
        transports["shm"] = ShmTransport(host.config)
        host.transports.append(announcement())
    if devices := host.config.worker.nixl_devices:
        transports["nixl"] = NixlTransport(host.config)
        host.transports.append(nixl_announcement(devices, host.engine.cache.pool.device.type))
    return [PrefillRoom(host, transports)]
