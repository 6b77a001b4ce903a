"""A worker with both rooms on one engine: it plays the roles it is given, and can be given others later."""

from __future__ import annotations

from functools import partial

from decode_worker.service import DecodeRoom
from kv_transfer.admission import Claims
from kv_transfer.base import Transport
from kv_transfer.grpc_transport import GrpcTransport
from kv_transfer.local import LocalTransport
from kv_transfer.nixl_agent import announcement as nixl_announcement
from kv_transfer.nixl_agent import check_devices
from kv_transfer.nixl_transport import NixlTransport
from kv_transfer.plasma import connect
from kv_transfer.ray_transport import RayTransport
from kv_transfer.service import MAX_MESSAGE_BYTES
from kv_transfer.shared_memory import SharedMemory, announcement, shared_memory
from kv_transfer.shm_transport import ShmTransport
from prefill_worker.service import PrefillRoom
from tandem.types import Role
from tandem.v1 import registry_pb2
from tandem.worker.host import Room, WorkerHost
from tandem.worker.main import WorkerKind


def worker_kind(roles: frozenset[Role]) -> WorkerKind:
    memory = shared_memory()
    allocate = memory.allocate if memory else None
    return WorkerKind(roles, partial(_rooms, memory), MAX_MESSAGE_BYTES, allocate, check_devices)


def _rooms(memory: SharedMemory | None, host: WorkerHost) -> list[Room]:
    """memory: of the engine's pool; an engine on another device than cpu has not taken it."""
    claims = Claims()
    plasma = connect()
    shared = memory if memory and memory.size else None
    decode = DecodeRoom(host, claims, plasma, shared)
    transports: dict[str, Transport] = {"local": LocalTransport(decode, claims), "grpc": GrpcTransport(host.config)}
    if shared is not None:
        transports["shm"] = ShmTransport(host.config)
        host.transports.append(announcement())
    if devices := host.config.worker.nixl_devices:
        transports["nixl"] = NixlTransport(host.config)
        host.transports.append(nixl_announcement(devices, host.engine.cache.pool.device.type))
    if plasma is not None:
        transports["ray"] = RayTransport(host.config, plasma)
        host.transports.append(registry_pb2.Transport(name="ray", domain=plasma.domain, node=plasma.node))
    return [PrefillRoom(host, transports), decode]
