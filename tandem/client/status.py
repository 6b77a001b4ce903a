"""What `status()` returns: the service as its router sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from tandem import wire
from tandem.types import ModelInfo, Role
from tandem.v1 import generation_pb2, registry_pb2

T = TypeVar("T")


@dataclass(frozen=True)
class KVTraffic:
    """One end's totals of one transport, since the worker started."""

    # Sealed, and ended in any other way.
    transfers: int
    failures: int
    bytes: int
    frames: int
    # Sealed transfers alone: at the sender the time in which it worked on them, at the receiver from opening to seal.
    seconds: float
    # Those of the sender's seconds that lie before the prompt's last token was computed.
    hidden_seconds: float
    # Frames whose bytes were not those that were sent; counted by the receiver.
    corrupt_frames: int


@dataclass(frozen=True)
class Load:
    """A worker's last heartbeat."""

    free_blocks: int
    # Prompt tokens not yet computed, waiting and running.
    queued_prompt_tokens: int
    running_decodes: int
    waiting_prefills: int
    reservations: int
    # Reserve calls that wait for blocks.
    waiting_reservations: int
    # From here on: since the worker started. KV by transport.
    kv_sent: Mapping[str, KVTraffic]
    kv_received: Mapping[str, KVTraffic]
    steps: int
    prefix_hit_tokens: int
    prefix_query_tokens: int
    # Blocks, now, of reservations that have ended while somebody was still writing into them.
    quarantined_blocks: int


@dataclass(frozen=True)
class Integrity:
    """What a worker's block pool said about itself."""

    ok: bool
    referenced_blocks: int
    reservations: int
    quarantined_blocks: int
    live_sequences: int
    problem: str


@dataclass(frozen=True)
class WorkerState:
    worker_id: str
    # host:port
    address: str
    roles: frozenset[Role]
    model: ModelInfo
    version: str
    pid: int
    device: str
    total_blocks: int
    # Ways in which it moves KV to and from other workers.
    transports: tuple[str, ...]
    load: Load
    # Blocks in its prefix cache, held or free, as far as the router has heard.
    cached_blocks: int
    heartbeat_age_ms: float
    draining: bool
    # None unless the check was asked for and the worker answered.
    integrity: Integrity | None


@dataclass(frozen=True)
class LiveRequest:
    request_id: str
    phase: str
    age_ms: float
    prefill_worker: str
    decode_worker: str


@dataclass(frozen=True)
class ServiceStatus:
    version: str
    uptime_ms: float
    live_requests: int
    finished_requests: int
    failed_requests: int
    # Their clients left, or their deadlines passed.
    cancelled_requests: int
    workers: tuple[WorkerState, ...]
    models: tuple[ModelInfo, ...]
    # Oldest first; at most 100.
    requests: tuple[LiveRequest, ...]
    # Port of the OpenAI-compatible HTTP door, on the router's host; 0: there is none.
    http_port: int

    def problems(self) -> list[str]:
        """What breaks the law "no orphan", one line each, after `status(check_integrity=True)`; empty: all is well.

        With requests live, blocks are in use for good reason; with none, nothing may be held. Of a pool that is not
        there nothing is known, and nothing can be served without it: that is a problem too.
        """
        played = {role for worker in self.workers for role in worker.roles}
        absent = [f"no {role} worker is ready: nothing can be served" for role in Role if role not in played]
        return absent + [
            problem for worker in self.workers for problem in _problems(worker, idle=self.live_requests == 0)
        ]


def _problems(worker: WorkerState, idle: bool) -> list[str]:
    found = worker.integrity
    if found is None:
        return [f"{worker.worker_id}: its pool could not be checked"]
    problems = [] if found.ok else [f"{worker.worker_id}: {found.problem or 'its pool is not in order'}"]
    held = {"referenced blocks": found.referenced_blocks, "reservations": found.reservations}
    orphans = [f"{count} {what}" for what, count in held.items() if count and idle]
    if orphans:
        problems.append(f"{worker.worker_id}: {' and '.join(orphans)} held, though no request is live")
    return problems


def _plain(kind: type[T], message: Any, **given: Any) -> T:
    """A dataclass whose other fields have the names of the message's."""
    names: Any = kind
    rest = {name: getattr(message, name) for name in names.__dataclass_fields__ if name not in given}
    return kind(**rest, **given)


def status_from_wire(message: generation_pb2.StatusResponse) -> ServiceStatus:
    return _plain(
        ServiceStatus,
        message,
        workers=tuple(_worker_from_wire(worker) for worker in message.workers),
        models=tuple(wire.model_from_wire(model) for model in message.models),
        requests=tuple(_plain(LiveRequest, request) for request in message.requests),
    )


def _traffic(by_transport: Mapping[str, registry_pb2.KVTraffic]) -> dict[str, KVTraffic]:
    return {name: _plain(KVTraffic, traffic) for name, traffic in by_transport.items()}


def _worker_from_wire(message: generation_pb2.WorkerStatus) -> WorkerState:
    hello, load = message.hello, message.load
    return _plain(
        WorkerState,
        hello,
        roles=wire.roles_from_wire(list(hello.roles)),
        model=wire.model_from_wire(hello.model),
        transports=tuple(transport.name for transport in hello.transports),
        load=_plain(Load, load, kv_sent=_traffic(load.kv_sent), kv_received=_traffic(load.kv_received)),
        cached_blocks=message.cached_blocks,
        heartbeat_age_ms=message.heartbeat_age_ms,
        draining=message.draining,
        integrity=_plain(Integrity, message.integrity) if message.HasField("integrity") else None,
    )
