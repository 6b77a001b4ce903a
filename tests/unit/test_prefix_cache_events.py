"""What workers tell of their prefix caches, and what the router makes of it: the index equals the cache."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.pool.prefix_index import SLICE_BLOCKS, PrefixIndex, name_blocks
from tandem.engine.block_pool import BlockPool, BlockTable
from tandem.errors import Refused
from tandem.prefix import MAX_CHANGES, NAME_BYTES, CacheChanges, chain_hashes
from tandem.v1 import registry_pb2
from tandem.wire import cache_changes_from_wire, cache_changes_to_wire

BLOCKS = 8


def cached(pool: BlockPool) -> set[bytes]:
    return set(pool._by_hash)


def names_of(index: PrefixIndex) -> set[bytes]:
    return set(index._names)


def hear(index: PrefixIndex, pool: BlockPool, limit: int = MAX_CHANGES, restart: bool = False) -> int:
    """One heartbeat, over the wire; returns how many names it carried."""
    changes = pool.cache_changes(limit, restart)
    index.apply(cache_changes_from_wire(cache_changes_to_wire(changes)))
    return len(changes.lost) + len(changes.gained)


def fill(pool: BlockPool, prompt: int, blocks: int) -> BlockTable | None:
    """A request of its own prompt: finds, takes and names its blocks."""
    names = chain_hashes(None, [prompt] * (4 * blocks), 4)
    table = pool.acquire(blocks, names)
    if table is not None:
        for block, name in zip(table.blocks, names, strict=True):
            pool.publish(block, name)
    return table


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["fill", "release", "beat", "rejoin"]), st.integers(0, 7), st.integers(0, 5)), max_size=80
)


@given(ACTIONS)
@settings(max_examples=300)
def test_after_any_events_the_index_is_the_cache(actions: list[tuple[str, int, int]]) -> None:
    pool, index, held = BlockPool(BLOCKS, 4), PrefixIndex(BLOCKS), list[BlockTable]()
    hear(index, pool, restart=True)
    for action, number, prompt in actions:
        if action == "fill" and (table := fill(pool, prompt, number)) is not None:
            held.append(table)
        elif action == "release" and held:
            held.pop(number % len(held)).release()
        elif action == "beat":
            assert hear(index, pool, limit=number) <= number
        elif action == "rejoin":
            index = PrefixIndex(BLOCKS)
            hear(index, pool, limit=number, restart=True)
        assert len(index) <= BLOCKS
    while hear(index, pool, limit=3):
        pass
    assert names_of(index) == cached(pool)


def test_what_comes_and_goes_between_heartbeats_is_not_told() -> None:
    pool = BlockPool(2, 4)
    for prompt in range(100):
        table = fill(pool, prompt, 2)
        assert table is not None
        table.release()
    changes = pool.cache_changes(MAX_CHANGES)
    assert (changes.lost, set(changes.gained)) == ((), cached(pool))
    assert pool.cache_changes(MAX_CHANGES) == CacheChanges()


def test_a_heartbeat_is_bounded_and_tells_a_chain_from_its_beginning() -> None:
    pool = BlockPool(4, 4)
    assert fill(pool, 7, 4) is not None
    names = tuple(chain_hashes(None, [7] * 16, 4))
    assert pool.cache_changes(3) == CacheChanges(gained=names[:3])
    assert pool.cache_changes(3) == CacheChanges(gained=names[3:])
    assert pool.cache_changes(4, restart=True) == CacheChanges(reset=True, gained=names)


def test_without_a_prefix_cache_nothing_is_told() -> None:
    pool = BlockPool(4, 4, prefix_cache=False)
    assert fill(pool, 7, 4) is not None
    assert pool.cache_changes(MAX_CHANGES) == CacheChanges()


def test_only_leading_blocks_count() -> None:
    one, two, three = chain_hashes(None, [1] * 12, 4)
    index = PrefixIndex(8)
    index.apply(CacheChanges(gained=(one,)))
    assert index.leading([one, two, three]) == 1
    index.apply(CacheChanges(gained=(two, three)))
    assert index.leading([one, two, three]) == 3
    assert index.leading([]) == 0
    index.apply(CacheChanges(lost=(three,)))
    assert index.leading([one, two, three]) == 2
    assert index.leading(chain_hashes(None, [2] * 12, 4)) == 0
    index.apply(CacheChanges(lost=(one,)))
    assert index.leading([one, two, three]) == 0
    index.apply(CacheChanges(reset=True))
    assert len(index) == 0


def test_a_prompt_computed_just_now_is_found_until_the_next_heartbeat_knows_better() -> None:
    names = chain_hashes(None, [1] * 12, 4)
    index = PrefixIndex(8)
    index.apply(CacheChanges(gained=(names[0],)))
    index.expect(names)
    assert (index.leading(names), len(index)) == (3, 1)
    index.apply(CacheChanges(gained=(names[1],)))
    assert (index.leading(names), len(index)) == (2, 2)
    index.expect(chain_hashes(None, [2] * 400, 4))
    assert len(index._expected) == 8


def test_a_worker_that_tells_more_than_its_pool_holds_fills_no_memory() -> None:
    index = PrefixIndex(2)
    index.apply(CacheChanges(gained=tuple(chain_hashes(None, [1] * 40, 4))))
    assert len(index) == 2


@pytest.mark.parametrize(("lost", "gained"), [(MAX_CHANGES, 1), (0, MAX_CHANGES + 1)])
def test_too_many_changes_are_refused(lost: int, gained: int) -> None:
    message = registry_pb2.PrefixCacheChanges(lost=b"x" * NAME_BYTES * lost, gained=b"x" * NAME_BYTES * gained)
    with pytest.raises(Refused, match=f"at most {MAX_CHANGES}"):
        cache_changes_from_wire(message)


def test_a_name_cut_short_is_refused() -> None:
    with pytest.raises(Refused, match="16 bytes"):
        cache_changes_from_wire(registry_pb2.PrefixCacheChanges(gained=b"x" * 17))


@pytest.mark.parametrize("blocks", [0, 1, SLICE_BLOCKS - 1, SLICE_BLOCKS, 2 * SLICE_BLOCKS + 3])
async def test_naming_in_slices_is_naming(blocks: int) -> None:
    prompt = tuple(range(blocks * 16 + 5))
    assert list(await name_blocks(prompt, 16, "tenant")) == chain_hashes(None, prompt, 16, "tenant")


async def test_naming_a_long_prompt_leaves_the_event_loop_free() -> None:
    """Others get a turn after each slice."""
    slices, block_size = 200, 16
    prompt = tuple(range(slices * SLICE_BLOCKS * block_size))
    turns, naming = 0, asyncio.create_task(name_blocks(prompt, block_size, ""))
    while not naming.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns >= slices
