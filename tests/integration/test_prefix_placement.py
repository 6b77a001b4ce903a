"""Prompts go to the worker that has their beginning: real workers, whose heartbeats tell what they cached."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from service import Service, running_service, wait_until

from tandem.types import RequestReport, Role, Usage

BLOCK = 16
PREFIX = 5 * BLOCK
POOL_BLOCKS = 40


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running_service(
        tmp_path_factory.mktemp("prefix"),
        prefill=2,
        decode=1,
        engine={"num_blocks": POOL_BLOCKS},
        router={"heartbeat_interval_s": 0.05},
    ) as service:
        yield service


def prefix(number: int) -> list[int]:
    """Five blocks of tokens that no other number has."""
    return [3 + (number * 97 + position * 7) % 1000 for position in range(PREFIX)]


def ask(service: Service, prompt: list[int], **options: str) -> tuple[RequestReport, Usage]:
    answer = service.client.complete(prompt, max_tokens=2, ignore_eos=True, **options)
    return answer.choices[0].report, answer.usage


def cached_blocks(service: Service) -> dict[str, int]:
    return {worker.worker_id: worker.cached_blocks for worker in service.status().workers}


def ask_and_hear(service: Service, prompt: list[int]) -> tuple[RequestReport, Usage]:
    """Returns when the router has heard what the prefill worker cached."""
    before = cached_blocks(service)
    report, usage = ask(service, prompt)
    worker = report.prefill_worker
    wait_until(lambda: cached_blocks(service)[worker] > before[worker], 5, "the heartbeat")
    return report, usage


def prefill_ids(service: Service) -> set[str]:
    return {worker.worker_id for worker in service.status().workers if Role.PREFILL in worker.roles}


def test_prompts_that_share_a_prefix_meet_where_it_is(service: Service) -> None:
    first, cold = ask_and_hear(service, [*prefix(1), 5])
    second, _ = ask_and_hear(service, [*prefix(2), 5])
    assert cold.cached_prompt_tokens == 0
    assert {first.prefill_worker, second.prefill_worker} == prefill_ids(service), "the emptier cache gets the stranger"
    for number, home in ((1, first), (2, second), (1, first), (2, second)):
        report, usage = ask(service, [*prefix(number), 6, 7, 8])
        assert (report.prefill_worker, usage.cached_prompt_tokens) == (home.prefill_worker, PREFIX)
        assert report.kv_reused_tokens == PREFIX, "the decode worker has it too"


def test_another_tenants_prefix_draws_nobody(service: Service) -> None:
    ask_and_hear(service, [*prefix(3), 5])
    _, usage = ask(service, [*prefix(3), 5], cache_salt="another tenant")
    assert usage.cached_prompt_tokens == 0


def test_evictions_are_heard(service: Service) -> None:
    home, _ = ask_and_hear(service, [*prefix(4), 5])
    blocks_at_home = 0
    # Which worker gets a stranger is decided by heartbeats: so many that this one is full of others, and then both.
    for number in range(100, 200):
        report, _ = ask(service, [*prefix(number), 5])
        blocks_at_home += PREFIX // BLOCK if report.prefill_worker == home.prefill_worker else 0
        if number >= 130 and blocks_at_home > POOL_BLOCKS:
            break
    wait_until(lambda: sum(cached_blocks(service).values()) > 2 * POOL_BLOCKS, 5, "full caches")
    assert max(cached_blocks(service).values()) <= POOL_BLOCKS
    _, usage = ask(service, [*prefix(4), 5])
    assert usage.cached_prompt_tokens == 0


def test_a_worker_that_restarts_starts_empty(service: Service) -> None:
    report, _ = ask(service, [*prefix(5), 5])
    said = f"worker {report.prefill_worker} joined at"
    name = next(name for name, process in service.processes.items() if said in process.output)
    before = prefill_ids(service)
    service.kill(name)
    wait_until(lambda: report.prefill_worker not in prefill_ids(service), 10, "the loss")
    service.start_worker(name, "prefill")
    service.wait_joined(3)
    (new,) = prefill_ids(service) - before
    assert cached_blocks(service)[new] == 0
    again, usage = ask(service, [*prefix(5), 5])
    assert again.prefill_worker == new, "an empty cache and an empty queue"
    assert usage.cached_prompt_tokens == 0
