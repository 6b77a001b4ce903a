"""A worker with both rooms on one engine: it plays the roles it is given, and can be given others later."""

from __future__ import annotations

from decode_worker.service import DecodeRoom
from kv_transfer.admission import Claims
from kv_transfer.base import Transport
from kv_transfer.grpc_transport import MAX_MESSAGE_BYTES, GrpcTransport
from kv_transfer.local import LocalTransport
from prefill_worker.service import PrefillRoom
from tandem.types import Role
from tandem.worker.host import Room, WorkerHost
from tandem.worker.main import WorkerKind


def worker_kind(roles: frozenset[Role]) -> WorkerKind:
    return WorkerKind(roles, _rooms, MAX_MESSAGE_BYTES)


def _rooms(host: WorkerHost) -> list[Room]:
    claims = Claims()
    decode = DecodeRoom(host, claims)
    transports: dict[str, Transport] = {"local": LocalTransport(decode, claims), "grpc": GrpcTransport(host.config)}
    return [PrefillRoom(host, transports), decode]
