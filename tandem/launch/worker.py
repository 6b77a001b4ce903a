"""A worker with both roles' services on one engine: it plays the roles it is given, and can be given others later."""

from __future__ import annotations

from decode_worker.service import DecodeService
from prefill_worker.service import PrefillService
from tandem.types import Role
from tandem.worker.main import WorkerKind


def worker_kind(roles: frozenset[Role]) -> WorkerKind:
    return WorkerKind(roles, {Role.PREFILL: PrefillService, Role.DECODE: DecodeService})
