"""When a draining worker may leave."""

from __future__ import annotations

import asyncio

import pytest

from tandem.config import parse_config
from tandem.engine.block_pool import BlockPool
from tandem.types import Role
from tandem.worker.engine_thread import EngineThread
from tandem.worker.host import WorkerHost

CONFIG = parse_config({"engine": {"kv_memory_mib": 4, "threads": 1}})


@pytest.fixture
async def host() -> WorkerHost:
    return WorkerHost(CONFIG, EngineThread(CONFIG), frozenset({Role.PREFILL}))


async def still_waits(leaving: asyncio.Task[None]) -> bool:
    done, _ = await asyncio.wait({leaving}, timeout=0.15)
    return not done


async def test_a_joined_worker_leaves_when_its_router_has_dismissed_it(host: WorkerHost) -> None:
    """An idle one cannot know what the router placed on it before it heard that it drains."""
    host.expected = True
    leaving = asyncio.create_task(host.until_idle())
    assert await still_waits(leaving)
    host.expected = False
    await asyncio.wait_for(leaving, 2)


async def test_an_integrity_check_of_a_large_pool_holds_nobody_up(host: WorkerHost) -> None:
    """Neither the event loop nor whoever takes and gives blocks meanwhile; and these do not look like a fault."""
    pool = host.engine.pool = BlockPool(100_000, 16)
    checking = asyncio.create_task(host.integrity())
    turns = 0
    while not checking.done():
        table = pool.acquire(50_000 + turns % 3)
        assert table is not None
        await asyncio.sleep(0.001)
        table.release()
        turns += 1
    assert turns >= 3
    report = checking.result()
    assert (report.ok, report.problem) == (True, "")
    assert (await host.integrity()).referenced_blocks == 0


async def test_a_worker_whose_router_is_gone_waits_for_nobody(host: WorkerHost) -> None:
    await asyncio.wait_for(host.until_idle(), 2)
