"""A process that plays the decode role only."""

from __future__ import annotations

from functools import partial

from decode_worker.service import DecodeRoom
from kv_transfer.nixl_agent import announcement as nixl_announcement
from kv_transfer.nixl_agent import check_devices
from kv_transfer.service import MAX_MESSAGE_BYTES
from kv_transfer.shared_memory import SharedMemory, announcement, shared_memory
from tandem.config import TandemConfig
from tandem.types import Role
from tandem.worker.host import Room, WorkerHost
from tandem.worker.main import WorkerKind, run_rooms


def run(config: TandemConfig, router: str) -> int:
    """Until SIGTERM; returns the exit code."""
    memory = shared_memory()
    allocate = memory.allocate if memory else None
    kind = WorkerKind(frozenset({Role.DECODE}), partial(_rooms, memory), MAX_MESSAGE_BYTES, allocate, check_devices)
    return run_rooms(kind, config, router)


def _rooms(memory: SharedMemory | None, host: WorkerHost) -> list[Room]:
    """memory: of the engine's pool; an engine on another device than cpu has not taken it."""
    if devices := host.config.worker.nixl_devices:
        host.transports.append(nixl_announcement(devices, host.engine.cache.pool.device.type))
    if memory is None or not memory.size:
        return [DecodeRoom(host)]
    host.transports.append(announcement())
    return [DecodeRoom(host, memory=memory)]
