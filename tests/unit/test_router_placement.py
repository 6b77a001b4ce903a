from __future__ import annotations

from dataclasses import replace

import pytest

from router.policy.base import Demand, Placement, WorkerView
from router.policy.placement import Placer
from router.pool.books import Ledger
from tandem.errors import InvalidRequest, Unavailable
from tandem.types import Role

PREFILL, DECODE = frozenset({Role.PREFILL}), frozenset({Role.DECODE})
BOTH = PREFILL | DECODE
SMALL = Demand(prompt_tokens=20, max_tokens=10)
choose = Placer("cache_aware").choose


def worker(worker_id: str, roles: frozenset[Role], **changes: object) -> WorkerView:
    view = WorkerView(
        worker_id=worker_id,
        roles=roles,
        draining=False,
        block_size=16,
        total_blocks=100,
        free_blocks=100,
        queued_prompt_tokens=0,
        live_requests=0,
    )
    return replace(view, **changes)  # type: ignore[arg-type]


def test_prefill_goes_to_the_shortest_queue() -> None:
    workers = [
        worker("p1", PREFILL, queued_prompt_tokens=50),
        worker("p2", PREFILL, queued_prompt_tokens=40),
        worker("d1", DECODE),
    ]
    assert choose(workers, SMALL) == Placement("p2", "d1")


def test_decode_goes_where_most_blocks_are_free_then_to_the_fewest_requests() -> None:
    prefill = worker("p1", PREFILL)
    crowded, roomy = worker("d1", DECODE, free_blocks=10), worker("d2", DECODE, free_blocks=11, live_requests=9)
    assert choose([prefill, crowded, roomy], SMALL).decode == "d2"
    assert choose([prefill, replace(roomy, free_blocks=10), crowded], SMALL).decode == "d1"


def test_a_colocated_prefill_worker_keeps_its_request() -> None:
    workers = [worker("c1", BOTH, free_blocks=1), worker("d1", DECODE)]
    assert choose(workers, SMALL) == Placement("c1", "c1")


def test_a_colocated_worker_that_cannot_hold_the_output_hands_it_off() -> None:
    workers = [worker("c1", BOTH, total_blocks=2), worker("d1", DECODE)]
    assert choose(workers, Demand(32, 2)) == Placement("c1", "d1")


def test_ties_are_broken_the_same_way_in_any_order() -> None:
    workers = [worker("b", BOTH), worker("a", BOTH)]
    assert choose(workers, SMALL) == choose(workers[::-1], SMALL) == Placement("a", "a")


def test_draining_workers_get_nothing() -> None:
    workers = [worker("p1", PREFILL, draining=True), worker("p2", PREFILL, queued_prompt_tokens=999)]
    assert choose([*workers, worker("d1", DECODE)], SMALL).prefill == "p2"


@pytest.mark.parametrize(("present", "missing"), [(PREFILL, "decode"), (DECODE, "prefill")])
def test_a_missing_role_is_named(present: frozenset[Role], missing: str) -> None:
    with pytest.raises(Unavailable, match=f"no {missing} worker has joined"):
        choose([worker("w", present)], SMALL)


def test_why_a_role_is_missing_is_said_if_it_is_known() -> None:
    absent = {Role.DECODE: "is there: the last one has left"}
    with pytest.raises(Unavailable, match=r"^no decode worker is there: the last one has left$"):
        choose([worker("w", PREFILL)], SMALL, absent)
    with pytest.raises(Unavailable, match=r"^no prefill worker has joined$"):
        choose([worker("w", DECODE)], SMALL, absent)


def test_all_draining_is_unavailable_not_invalid() -> None:
    with pytest.raises(Unavailable, match="every decode worker that could hold the request is draining"):
        choose([worker("p", PREFILL), worker("d", DECODE, draining=True)], SMALL)


@pytest.mark.parametrize(
    ("prefill_blocks", "decode_blocks", "message"),
    [
        (1, 100, "room for 20 tokens; the largest prefill worker holds 16"),
        (100, 1, "room for 29 tokens; the largest decode worker holds 16"),
    ],
)
def test_what_no_worker_could_ever_hold_is_invalid_and_names_the_limit(
    prefill_blocks: int, decode_blocks: int, message: str
) -> None:
    workers = [
        worker("p", PREFILL, total_blocks=prefill_blocks),
        worker("d", DECODE, total_blocks=decode_blocks, draining=True),
    ]
    with pytest.raises(InvalidRequest, match=message):
        choose(workers, SMALL)


def test_exactly_the_pool_fits() -> None:
    workers = [worker("p", PREFILL, total_blocks=2), worker("d", DECODE, total_blocks=2)]
    assert choose(workers, Demand(23, 10)) == Placement("p", "d")
    with pytest.raises(InvalidRequest):
        choose(workers, Demand(24, 10))


def test_the_ledger_keeps_what_no_heartbeat_has_counted_yet() -> None:
    ledger = Ledger()
    ledger.place("taken", 5)
    ledger.place("waiting", 7)
    ledger.taken("taken", counted_from=9)
    ledger.taken("unknown", counted_from=1)
    ledger.heartbeat(8)  # was on its way when the worker took it
    assert (ledger.total, len(ledger)) == (12, 2)
    ledger.heartbeat(9)
    assert (ledger.total, len(ledger)) == (7, 1)
    ledger.taken("waiting", counted_from=9)  # the heartbeat overtook the word of it
    assert (ledger.total, len(ledger)) == (0, 0)
    ledger.drop("taken")
    assert (ledger.total, len(ledger)) == (0, 0)


def test_a_cached_prefix_draws_the_prompt() -> None:
    workers = [worker("p1", PREFILL), worker("p2", PREFILL, cached_blocks=1), worker("d1", DECODE)]
    assert choose(workers, SMALL).prefill == "p2"


@pytest.mark.parametrize(("queued", "chosen"), [(79, "hot"), (81, "cold")])
def test_a_cached_prefix_is_worth_the_queue_that_it_saves(queued: int, chosen: str) -> None:
    workers = [
        worker("cold", PREFILL),
        worker("hot", PREFILL, cached_blocks=5, queued_prompt_tokens=queued),
        worker("d1", DECODE),
    ]
    assert choose(workers, Demand(prompt_tokens=90, max_tokens=10)).prefill == chosen


def test_many_prompts_of_one_prefix_spread_when_the_worker_that_has_it_is_busy() -> None:
    queued = {"cold": 0, "hot": 0}
    for _ in range(20):
        views = [
            worker(name, PREFILL, queued_prompt_tokens=tokens, cached_blocks=5 if name == "hot" else 0)
            for name, tokens in queued.items()
        ]
        prefill = choose([*views, worker("d1", DECODE)], Demand(160, 1)).prefill
        queued[prefill] += next(view for view in views if view.worker_id == prefill).to_compute(160)
    assert queued["cold"] > 0
    assert abs(queued["hot"] - queued["cold"]) <= 160


def test_a_prompt_that_is_cached_to_its_end_is_still_computed_from_its_last_block() -> None:
    view = worker("p", PREFILL, cached_blocks=2)
    assert [view.to_compute(tokens) for tokens in (31, 32, 33, 40)] == [15, 16, 1, 8]


def test_prompts_that_share_nothing_fill_every_cache() -> None:
    workers = [worker("p1", PREFILL, cache_size=9), worker("p2", PREFILL, cache_size=8), worker("d1", DECODE)]
    assert choose(workers, SMALL).prefill == "p2"


@pytest.mark.parametrize(("free", "chosen"), [(96, "hot"), (94, "cold")])
def test_decode_weighs_cached_blocks_against_free_ones(free: int, chosen: str) -> None:
    workers = [
        worker("p1", PREFILL),
        worker("cold", DECODE, free_blocks=100),
        worker("hot", DECODE, free_blocks=free, cached_blocks=5),
    ]
    assert choose(workers, Demand(90, 10)).decode == chosen
