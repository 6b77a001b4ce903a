"""What goes into a step: decodes first, chunks within the budget, nobody admitted without all of its blocks."""

from __future__ import annotations

import pytest

from tandem.config import EngineConfig
from tandem.engine.block_pool import BlockPool
from tandem.engine.scheduler import Scheduler
from tandem.engine.sequence import Sequence
from tandem.errors import Overloaded
from tandem.types import EngineRequest, SamplingParams


def _sequence(prompt_len: int, first: int = 0) -> Sequence:
    request = EngineRequest("r", tuple(range(first, first + prompt_len)), SamplingParams(max_tokens=4))
    return Sequence(request, lambda event: None, decode_here=False)


def _scheduler(blocks: int = 64, **settings: int) -> Scheduler:
    return Scheduler(EngineConfig(max_step_tokens=16, **settings), BlockPool(blocks, 4))


def _chunks(scheduler: Scheduler) -> list[tuple[int, int]]:
    plan = scheduler.schedule()
    scheduler.advance(plan)
    return [(chunk.start, chunk.end) for chunk in plan.prefills]


def test_a_long_prompt_is_cut_to_the_budget() -> None:
    scheduler = _scheduler()
    scheduler.add(_sequence(40))
    assert [_chunks(scheduler) for _ in range(4)] == [[(0, 16)], [(16, 32)], [(32, 40)], []]
    assert scheduler.num_live == 0


def test_short_prompts_share_a_step_in_order_of_arrival() -> None:
    scheduler = _scheduler()
    for first in (0, 100, 200):
        scheduler.add(_sequence(7, first))
    assert _chunks(scheduler) == [(0, 7), (0, 7)], "a part of the third would only delay the first tokens of these"
    assert _chunks(scheduler) == [(0, 7)]


def test_the_end_of_a_long_prompt_waits_for_no_part_of_the_next_but_for_a_whole_one() -> None:
    scheduler = _scheduler()
    for length, first in ((20, 0), (20, 100), (6, 200), (6, 300)):
        scheduler.add(_sequence(length, first))
    steps = [[(0, 16)], [(16, 20)], [(0, 16)], [(16, 20), (0, 6), (0, 6)]]
    for step in steps:
        plan = scheduler.schedule()
        assert [(chunk.start, chunk.end) for chunk in plan.chunks] == step
        assert plan.started == [chunk.sequence for chunk in plan.chunks if chunk.start == 0]
        scheduler.advance(plan)
    assert scheduler.num_live == 0


def test_a_step_that_decodes_is_filled() -> None:
    """The next one would make those who decode wait again."""
    scheduler = _scheduler()
    decoding = _sequence(4, 1000)
    decoding.table = scheduler.pool.acquire(2)
    decoding.output_ids = [1]
    scheduler.attach(decoding)
    for first in (0, 100):
        scheduler.add(_sequence(10, first))
    assert _chunks(scheduler) == [(0, 10), (0, 5)]


def test_decodes_come_first_and_leave_the_rest_to_chunks() -> None:
    scheduler = _scheduler()
    for first in (1000, 2000, 3000):
        decoding = _sequence(4, first)
        decoding.table = scheduler.pool.acquire(2)
        decoding.output_ids = [1]
        scheduler.attach(decoding)
    scheduler.add(_sequence(40))
    plan = scheduler.schedule()
    assert len(plan.decodes) == 3
    assert [(chunk.start, chunk.end) for chunk in plan.prefills] == [(0, 13)]


def test_more_decodes_than_fit_take_turns() -> None:
    scheduler = _scheduler(max_running=2)
    decoding = [_sequence(4, first) for first in (0, 100, 200)]
    for sequence in decoding:
        sequence.table = scheduler.pool.acquire(2)
        sequence.output_ids = [1]
        scheduler.attach(sequence)
    turns = [scheduler.schedule().sequences for _ in range(3)]
    assert [len(turn) for turn in turns] == [2, 2, 2]
    assert all(sum(sequence in turn for turn in turns) == 2 for sequence in decoding)


def test_a_prompt_waits_for_blocks_and_those_behind_it_wait_too() -> None:
    scheduler = _scheduler(blocks=4)
    first, large, small = _sequence(12, 0), _sequence(12, 100), _sequence(4, 200)
    for sequence in (first, large, small):
        scheduler.add(sequence)
    assert _chunks(scheduler) == [(0, 12)]
    assert _chunks(scheduler) == [], "the large one waits for blocks, and the small one does not overtake it"
    assert first.table is not None
    first.table.release()
    assert _chunks(scheduler) == [(0, 12), (0, 4)]


def test_a_cached_prefix_is_not_computed_again_but_its_last_token_is() -> None:
    scheduler = _scheduler()
    for _ in range(2):
        sequence = _sequence(12)
        scheduler.add(sequence)
        chunks = _chunks(scheduler)
        assert sequence.table is not None
        sequence.table.release()
    assert chunks == [(8, 12)], "two of three blocks are reused; the third holds the token whose logits are needed"


def test_a_full_queue_refuses() -> None:
    scheduler = _scheduler(max_waiting=1)
    scheduler.add(_sequence(4))
    with pytest.raises(Overloaded, match="max_waiting is 1"):
        scheduler.add(_sequence(4))


def test_a_prompt_that_brought_its_blocks_does_not_wait_behind_one_that_waits_for_them() -> None:
    """Or the two would wait for each other: the pool is full of what the second one reserved."""
    scheduler = _scheduler(blocks=4)
    reserved = _sequence(8)
    reserved.table = scheduler.pool.acquire(4)
    first = _sequence(8, 100)
    scheduler.add(first)
    scheduler.add(reserved)
    assert [chunk.sequence for chunk in scheduler.schedule().chunks] == [reserved]
    assert list(scheduler.waiting) == [first]
    assert reserved.table is not None
    reserved.table.release()
    assert [chunk.sequence for chunk in scheduler.schedule().chunks] == [reserved, first]
