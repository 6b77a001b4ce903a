"""A process that plays the decode role only."""

from __future__ import annotations

from decode_worker.service import DecodeRoom
from kv_transfer.service import MAX_MESSAGE_BYTES
from tandem.config import TandemConfig
from tandem.types import Role
from tandem.worker.main import WorkerKind, run_rooms


def run(config: TandemConfig, router: str) -> int:
    """Until SIGTERM; returns the exit code."""
    kind = WorkerKind(frozenset({Role.DECODE}), lambda host: [DecodeRoom(host)], MAX_MESSAGE_BYTES)
    return run_rooms(kind, config, router)
