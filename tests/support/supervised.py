"""A supervisor over stand-ins for router and worker, so that no model is needed."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil

from tandem.client import AsyncClient
from tandem.config import TandemConfig, load_config
from tandem.errors import Unavailable
from tandem.launch.processes import Supervisor

SUPPORT = Path(__file__).parent
ENVIRONMENT = {"PYTHONPATH": os.pathsep.join([str(SUPPORT), str(SUPPORT.parents[1])])}
BOUND_S = 30.0


class Service:
    """A supervisor with stand-ins, and what they said."""

    def __init__(self, *, relays: bool = True, start_timeout_s: float = BOUND_S, **settings: dict[str, Any]) -> None:
        """relays: what the stand-ins say comes into `lines`."""
        self.lines: list[tuple[str, str]] = []
        self.supervisor = Supervisor(
            config_of(**settings),
            output=(lambda name, line: self.lines.append((name, line))) if relays else None,
            start_timeout_s=start_timeout_s,
            environment=ENVIRONMENT,
            router_module="standin_router",
            worker_module="standin_worker",
        )

    def args_of(self, name: str) -> list[str]:
        return next(line.split()[1:] for who, line in self.lines if who == name and line.startswith("args"))


def config_of(**settings: dict[str, Any]) -> TandemConfig:
    return load_config(overrides={"router": {"port": 0}, "worker": {"drain_timeout_s": 0.0}, **settings})


@asynccontextmanager
async def running(**settings: dict[str, Any]) -> AsyncIterator[Service]:
    service = Service(**settings)
    await service.supervisor.start()
    pids = service.supervisor.pids()
    try:
        yield service
    finally:
        pids |= service.supervisor.pids()
        await service.supervisor.stop()
        assert not [pid for pid in pids.values() if psutil.pid_exists(pid)]


async def eventually(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(BOUND_S):
        while not holds():
            await asyncio.sleep(0.02)


async def joined_pids(address: str) -> set[int]:
    async with AsyncClient(address) as client:
        try:
            return {worker.pid for worker in (await client.status()).workers}
        except Unavailable:
            return set()


async def until_joined(service: Service, pids: Callable[[], set[int]]) -> None:
    async with asyncio.timeout(BOUND_S):
        while not pids() or await joined_pids(service.supervisor.address) != pids():
            await asyncio.sleep(0.02)


def workers_of(service: Service) -> set[int]:
    return {pid for name, pid in service.supervisor.pids().items() if name != "router"}
