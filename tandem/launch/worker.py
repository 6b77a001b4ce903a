"""A worker with both rooms on one engine: it plays the roles it is given, and can be given others later."""

from __future__ import annotations

from decode_worker.service import DecodeRoom
from kv_transfer.admission import Claims
from kv_transfer.base import Transport
from kv_transfer.grpc_transport import GrpcTransport
from kv_transfer.local import LocalTransport
from kv_transfer.plasma import connect
from kv_transfer.ray_transport import RayTransport
from kv_transfer.service import MAX_MESSAGE_BYTES
from prefill_worker.service import PrefillRoom
from tandem.types import Role
from tandem.v1 import registry_pb2
from tandem.worker.host import Room, WorkerHost
from tandem.worker.main import WorkerKind


def worker_kind(roles: frozenset[Role]) -> WorkerKind:
    return WorkerKind(roles, _rooms, MAX_MESSAGE_BYTES)


def _rooms(host: WorkerHost) -> list[Room]:
    claims = Claims()
    plasma = connect()
    decode = DecodeRoom(host, claims, plasma)
    transports: dict[str, Transport] = {"local": LocalTransport(decode, claims), "grpc": GrpcTransport(host.config)}
    if plasma is not None:
        transports["ray"] = RayTransport(host.config, plasma)
        host.transports.append(registry_pb2.Transport(name="ray", domain=plasma.domain, node=plasma.node))
    return [PrefillRoom(host, transports), decode]
