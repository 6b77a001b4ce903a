"""The block pool keeps its promises under any order of calls, and from several threads."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.engine.block_pool import BlockPool, BlockTable
from tandem.errors import TransferFailed
from tandem.prefix import chain_hashes


def _names(tokens: list[int], salt: str = "") -> list[bytes]:
    return chain_hashes(None, tokens, 4, salt)


def _publish_all(pool: BlockPool, table: BlockTable, tokens: list[int]) -> None:
    for block, name in zip(table.blocks, _names(tokens), strict=False):
        pool.publish(block, name)


def test_names_cover_the_whole_prefix() -> None:
    one, other = _names([1, 2, 3, 4, 5, 6, 7, 8]), _names([9, 2, 3, 4, 5, 6, 7, 8])
    assert one[1] != other[1], "the second blocks hold the same tokens after different beginnings"
    assert one == [*_names([1, 2, 3, 4]), *chain_hashes(_names([1, 2, 3, 4])[-1], [5, 6, 7, 8], 4)]
    assert _names([1, 2, 3]) == []
    assert _names([1, 2, 3, 4], "tenant") != _names([1, 2, 3, 4])


def test_a_full_pool_gives_nothing_and_holds_nothing() -> None:
    pool = BlockPool(4, 4)
    table = pool.acquire(3)
    assert table is not None
    assert pool.acquire(2) is None
    assert pool.num_free == 1
    table.release()
    table.release()
    assert pool.num_free == 4


def test_a_shared_prefix_is_found_while_held_and_after() -> None:
    pool = BlockPool(4, 4)
    tokens = list(range(8))
    first = pool.acquire(2)
    assert first is not None
    _publish_all(pool, first, tokens)
    second = pool.acquire(3, _names(tokens))
    assert second is not None
    assert second.blocks[:2] == first.blocks
    assert second.cached_tokens == 8
    first.release()
    second.release()
    third = pool.acquire(2, _names(tokens))
    assert third is not None
    assert third.cached_tokens == 8
    third.release()


def test_eviction_takes_the_least_recently_used_chain_from_its_end() -> None:
    pool = BlockPool(4, 4)
    old, new = list(range(8)), list(range(10, 18))
    for tokens in (old, new):
        table = pool.acquire(2)
        assert table is not None
        _publish_all(pool, table, tokens)
        table.release()
    taken = pool.acquire(1)
    assert taken is not None
    revived = pool.acquire(3, _names(old))
    assert revived is not None
    assert revived.cached_tokens == 4, "the old chain's end went first, its beginning is still of use"
    taken.release()
    revived.release()


def test_cached_blocks_count_once_when_room_is_judged() -> None:
    pool = BlockPool(4, 4)
    tokens = list(range(8))
    table = pool.acquire(2)
    assert table is not None
    _publish_all(pool, table, tokens)
    table.release()
    assert pool.acquire(5, _names(tokens)) is None
    whole = pool.acquire(4, _names(tokens))
    assert whole is not None
    assert len(set(whole.blocks)) == 4
    whole.release()


def test_salted_tenants_share_nothing() -> None:
    pool = BlockPool(4, 4)
    table = pool.acquire(1)
    assert table is not None
    _publish_all(pool, table, [1, 2, 3, 4])
    other = pool.acquire(1, _names([1, 2, 3, 4], "tenant"))
    assert other is not None
    assert other.cached_tokens == 0
    table.release()
    other.release()


def test_blocks_released_in_use_are_quarantined_until_the_user_leaves() -> None:
    pool = BlockPool(2, 4)
    table = pool.acquire(2)
    assert table is not None
    with table.in_use():
        table.release()
        assert pool.num_free == 0
        assert pool.check_integrity().quarantined == 2
        with pytest.raises(TransferFailed), table.in_use():
            pass
    assert pool.num_free == 2
    assert pool.check_integrity().quarantined == 0


def test_a_broken_invariant_is_found_wherever_it_is() -> None:
    def broken(spoil: Callable[[BlockPool], object]) -> str:
        pool = BlockPool(10_000, 4)
        table = pool.acquire(9_000)
        assert table is not None
        _publish_all(pool, table, list(range(8)))
        spoil(pool)
        return pool.check_integrity().problem

    assert broken(lambda pool: None) == ""
    assert broken(lambda pool: pool._refs.__setitem__(8_999, 0)) == "block 8999 has 0 references and is not free"
    assert broken(lambda pool: pool._free.__setitem__(5_000, None)) == "block 5000 has 1 references and is free"
    assert "another's hash" in broken(lambda pool: pool._hash_of.__setitem__(7_000, _names([0, 1, 2, 3])[0]))
    assert "another's hash" in broken(lambda pool: pool._by_hash.__setitem__(b"stray", 9_999))


def test_on_free_is_told() -> None:
    pool = BlockPool(2, 4)
    calls: list[int] = []
    pool.on_free = lambda: calls.append(pool.num_free)
    table = pool.acquire(2)
    assert table is not None
    table.release()
    assert calls == [2]


_STEPS = st.lists(
    st.tuples(st.sampled_from(["acquire", "release", "publish"]), st.integers(0, 7), st.integers(0, 3)), max_size=60
)


@given(_STEPS)
@settings(max_examples=200)
def test_any_order_of_calls_keeps_the_invariants(steps: list[tuple[str, int, int]]) -> None:
    pool = BlockPool(8, 4)
    held: list[tuple[BlockTable, list[int]]] = []
    for action, number, prompt in steps:
        tokens = [prompt] * 32
        if action == "acquire":
            table = pool.acquire(number, _names(tokens)[:number])
            if table is not None:
                assert len(table.blocks) == number
                held.append((table, tokens))
        elif held:
            table, tokens = held[number % len(held)]
            if action == "publish":
                _publish_all(pool, table, tokens)
            else:
                table.release()
                held.remove((table, tokens))
        report = pool.check_integrity()
        assert report.problem == ""
        assert report.referenced == len({block for table, _ in held for block in table.blocks})
        assert report.free + report.referenced == 8
    for table, _ in held:
        table.release()
    assert pool.num_free == 8


def test_threads_may_acquire_and_release_at_once() -> None:
    pool = BlockPool(16, 4)
    tokens = list(range(16))
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(300):
                table = pool.acquire(4, _names(tokens))
                if table is not None:
                    _publish_all(pool, table, tokens)
                    with table.in_use():
                        table.release()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    report = pool.check_integrity()
    assert (report.problem, report.free, report.referenced, report.quarantined) == ("", 16, 0, 0)
