"""A worker whose GPU is lost ends, and another one is started in its place. The error is planted, all else is real."""

from __future__ import annotations

import asyncio
import logging

import pytest
from supervised import BOUND_S, ENVIRONMENT, config_of

from tandem.client import AsyncClient
from tandem.errors import TandemError
from tandem.launch.processes import Supervisor


async def test_a_worker_that_lost_its_device_ends_and_is_replaced(caplog: pytest.LogCaptureFixture) -> None:
    lines: list[tuple[str, str]] = []
    supervisor = Supervisor(
        config_of(
            serve={"prefill": 0, "decode": 0, "colocated": 1},
            engine={"kv_memory_mib": 4, "threads": 1},
            router={"port": 0, "http_port": -1},
        ),
        output=lambda name, line: lines.append((name, line)),
        start_timeout_s=120.0,
        environment=ENVIRONMENT,
        worker_module="lost_device_worker",
    )
    caplog.set_level(logging.WARNING)
    async with supervisor, AsyncClient(supervisor.address) as client:
        before = supervisor.pids()["worker-0"]
        with pytest.raises(TandemError) as lost:
            await client.complete(list(range(5, 18)), max_tokens=2)
        assert lost.value.code in ("worker_lost", "internal")
        async with asyncio.timeout(4 * BOUND_S):
            while supervisor.pids().get("worker-0", before) == before:
                await asyncio.sleep(0.05)
        # Said in one line by the worker, and by who starts the next.
        (told,) = [record.getMessage() for record in caplog.records if "worker-0" in record.getMessage()]
        assert "exited with code 1: the device is lost: CUDA error: an illegal memory access" in told
        assert any("a new one may find its device in order" in line for name, line in lines if name == "worker-0")
