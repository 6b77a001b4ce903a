"""The router sends prompts where their beginning is cached: what heartbeats told, and what happened since."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from router_house import DECODE, PREFILL, House, collect, configuration, eventually_status, finish_of, open_house
from scripted_worker import ScriptedWorker

from tandem.prefix import CacheChanges, chain_hashes
from tandem.types import RequestReport
from tandem.v1 import generation_pb2, registry_pb2
from tandem.wire import cache_changes_to_wire

PREFIX = list(range(80))
NAMES = tuple(chain_hashes(None, PREFIX, 16, "tenant"))


@pytest.fixture
async def house() -> AsyncIterator[House]:
    async with open_house(configuration()) as house:
        yield house
        await house.check_empty()


async def tell(worker: ScriptedWorker, **changes: object) -> None:
    """One heartbeat, and no other ones from then on."""
    worker.silent = True
    message = cache_changes_to_wire(CacheChanges(**changes))  # type: ignore[arg-type]
    await worker.call.write(registry_pb2.Heartbeat(load=worker.load, prefix_cache=message))


async def told(house: House, worker_id: str, blocks: int) -> None:
    await eventually_status(
        house, lambda status: {w.hello.worker_id: w.cached_blocks for w in status.workers}[worker_id] == blocks
    )


async def ask(house: House, tail: int, salt: str = "tenant") -> RequestReport:
    prompt = generation_pb2.TokenIds(ids=[*PREFIX, tail])
    return finish_of(await collect(house.call(3, token_ids=prompt, cache_salt=salt))).report


async def test_a_prompt_follows_its_prefix_to_both_workers(house: House) -> None:
    for name, roles in (("p1", PREFILL), ("p2", PREFILL), ("d1", DECODE), ("d2", DECODE)):
        await house.join(name, roles)
    for name in ("p2", "d2"):
        await tell(house.cluster.workers[name], gained=NAMES)
        await told(house, name, 5)
    report = await ask(house, 1)
    assert (report.prefill_worker, report.decode_worker) == ("p2", "d2")
    assert (await ask(house, 1, salt="another tenant")).prefill_worker == "p1"


async def test_what_a_worker_evicted_draws_nobody(house: House) -> None:
    workers = {name: await house.join(name, PREFILL) for name in ("p1", "p2")}
    await house.join("d1", DECODE)
    await tell(workers["p1"], gained=tuple(chain_hashes(None, [9] * 160, 16)))
    await told(house, "p1", 10)
    await tell(workers["p2"], gained=NAMES)
    await told(house, "p2", 5)
    await tell(workers["p2"], lost=NAMES[:1])
    await told(house, "p2", 4)
    assert (await ask(house, 1)).prefill_worker == "p2", "the emptier cache"
    await tell(workers["p2"], gained=tuple(chain_hashes(None, [8] * 320, 16)))
    await told(house, "p2", 24)
    assert (await ask(house, 2)).prefill_worker == "p1", "four blocks without their beginning are no prefix"


async def test_the_next_prompt_need_not_wait_for_a_heartbeat(house: House) -> None:
    workers = [await house.join(name, roles) for name, roles in (("p1", PREFILL), ("p2", PREFILL), ("d1", DECODE))]
    for worker in workers:
        worker.silent = True
    await tell(workers[0], gained=tuple(chain_hashes(None, [9] * 32, 16)))
    await told(house, "p1", 2)
    assert (await ask(house, 1)).prefill_worker == "p2", "the emptier cache"
    await tell(workers[1], gained=tuple(chain_hashes(None, [7] * 160, 16)))
    await told(house, "p2", 10)
    assert (await ask(house, 2)).prefill_worker == "p1", "p2's heartbeat did not confirm it, and its cache is fuller"
    assert (await ask(house, 3)).prefill_worker == "p1", "the prefix is there since the last request"


async def test_a_busy_worker_keeps_no_prefix_to_itself(house: House) -> None:
    workers = [await house.join(name, PREFILL) for name in ("p1", "p2")]
    await house.join("d1", DECODE)
    workers[1].load.queued_prompt_tokens = 81
    await tell(workers[1], gained=NAMES)
    await told(house, "p2", 5)
    assert (await ask(house, 1)).prefill_worker == "p1"
