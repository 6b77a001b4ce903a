from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from router.life.events import BURST, INTERVAL_S, RATE, EmitPacer


def noting(seen: list[int], number: int) -> Callable[[], None]:
    return lambda: seen.append(number)


async def test_a_turn_comes_at_once_while_there_are_few() -> None:
    pacer, seen = EmitPacer(), list[int]()
    for number in range(BURST):
        pacer.ask(noting(seen, number))
    assert seen == list(range(BURST))


async def test_those_who_waited_get_one_turn_in_each_pass_of_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    pacer, seen, last = EmitPacer(), list[int](), asyncio.Event()
    loop, passes, now_s = asyncio.get_running_loop(), 0, 1e6
    monkeypatch.setattr(loop, "time", lambda: now_s)
    for number in range(BURST):
        pacer.ask(noting(seen, number))
    assert len(seen) == BURST
    taken_in = list[int]()
    for _ in range(20):
        pacer.ask(lambda: taken_in.append(passes))
    pacer.ask(last.set)
    while not last.is_set():
        await asyncio.sleep(0)
        passes, now_s = passes + 1, now_s + 2 / RATE  # two turns become due in each
    assert len(taken_in) == len(set(taken_in)) == 20


async def test_many_wait_in_order_and_each_gets_one_turn() -> None:
    pacer, seen, loop = EmitPacer(), list[int](), asyncio.get_running_loop()
    started_s, everybody = loop.time(), asyncio.Event()
    for number in range(3 * BURST):
        pacer.ask(noting(seen, number))
    pacer.ask(everybody.set)
    await asyncio.wait_for(everybody.wait(), 5)
    assert seen == list(range(3 * BURST))
    assert loop.time() - started_s >= 2 * BURST / RATE - INTERVAL_S


async def test_new_ones_queue_behind_those_who_wait() -> None:
    pacer, seen, last = EmitPacer(), list[int](), asyncio.Event()
    for number in range(BURST + 2):
        pacer.ask(noting(seen, number))
    await asyncio.sleep(0)
    pacer.ask(noting(seen, -1))
    pacer.ask(last.set)
    await asyncio.wait_for(last.wait(), 5)
    assert seen == [*range(BURST + 2), -1]
