"""Law 6: while a step is under way, the event loop goes on; calls wait for the step's end."""

from __future__ import annotations

import asyncio
import threading
from functools import partial
from typing import Any

import pytest

from tandem.config import parse_config
from tandem.engine.sequence import EngineEvent, NewToken, Sequence, Started
from tandem.types import EngineRequest, SamplingParams
from tandem.worker.engine_thread import EngineThread

REQUEST = EngineRequest("r", (5, 6, 7), SamplingParams(max_tokens=4, ignore_eos=True))


@pytest.fixture
def thread() -> EngineThread:
    return EngineThread(parse_config({"engine": {"kv_memory_mib": 4, "threads": 1}}))


async def test_the_loop_runs_while_a_step_is_stuck(thread: EngineThread, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, go_on = threading.Event(), threading.Event()
    engine, run = thread.engine, thread.engine._runner.run

    def stuck(*arguments: Any) -> object:
        entered.set()
        assert go_on.wait(30)
        return run(*arguments)

    monkeypatch.setattr(engine._runner, "run", stuck)
    thread.start()
    events: asyncio.Queue[EngineEvent] = asyncio.Queue()
    sequence = Sequence(REQUEST, events.put_nowait, decode_here=True, table=engine.reserve(REQUEST, True))
    await thread.call(lambda: engine.add(sequence))
    await asyncio.to_thread(entered.wait, 30)
    # What a heartbeat and a reservation need is answered at once; what must wait for the step waits.
    assert engine.load.waiting + engine.load.running <= 1
    other = engine.reserve(REQUEST, False)
    assert other is not None
    other.release()
    between_steps = asyncio.ensure_future(thread.call(lambda: "done"))
    done, _ = await asyncio.wait({between_steps}, timeout=0.05)
    assert not done
    go_on.set()
    assert await between_steps == "done"
    positions = []
    while len(positions) < 4:
        event = await events.get()
        if isinstance(event, NewToken):
            positions.append(event.position)
    assert positions == [0, 1, 2, 3]
    thread.stop()
    assert engine.pool.num_free == engine.pool.num_blocks


async def test_a_call_returns_or_raises_what_its_function_does(thread: EngineThread) -> None:
    thread.start()
    assert await thread.call(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        await thread.call(lambda: 1 / 0)
    thread.stop()


async def test_a_prompt_that_waits_for_blocks_costs_nothing_and_goes_on_when_they_come(
    thread: EngineThread, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine, steps = thread.engine, [0]
    step = engine.step

    def counted() -> bool:
        steps[0] += 1
        return step()

    monkeypatch.setattr(engine, "step", counted)
    engine.pool.on_free = thread.wake
    thread.start()
    everything = engine.pool.acquire(engine.pool.num_blocks)
    assert everything is not None
    events: asyncio.Queue[EngineEvent] = asyncio.Queue()
    sequence = Sequence(REQUEST, events.put_nowait, decode_here=False)
    await thread.call(lambda: engine.add(sequence))
    await asyncio.sleep(0.1)  # a thread that spun would make thousands of steps
    assert steps[0] == 1
    assert engine.load.waiting == 1
    everything.release()
    assert isinstance(await asyncio.wait_for(events.get(), 30), Started)
    thread.stop()
    assert sequence.table is not None
    sequence.table.release()
    assert not caplog.records


async def test_a_crash_of_the_thread_is_told(thread: EngineThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread.engine._scheduler, "schedule", lambda: 1 / 0)
    thread.start()
    assert thread.crashed is not None
    sequence = Sequence(REQUEST, lambda event: None, decode_here=False)
    thread.post(lambda: thread.engine.add(sequence))
    with pytest.raises(ZeroDivisionError):
        await asyncio.wait_for(thread.crashed, 30)
    thread.stop()


async def test_a_listener_that_fails_takes_nobody_with_it(thread: EngineThread) -> None:
    thread.start()
    events: asyncio.Queue[EngineEvent] = asyncio.Queue()

    def broken(event: EngineEvent) -> None:
        raise ZeroDivisionError

    requests = [EngineRequest(name, (5, 6, 7), SamplingParams(max_tokens=4, ignore_eos=True)) for name in "ab"]
    for request, listener in zip(requests, (broken, events.put_nowait), strict=True):
        sequence = Sequence(request, listener, decode_here=True, table=thread.engine.reserve(request, True))
        thread.post(partial(thread.engine.add, sequence))
    positions = []
    while len(positions) < 4:
        event = await events.get()
        positions += [event.position] if isinstance(event, NewToken) else []
    assert positions == [0, 1, 2, 3]
    while thread.engine.num_live:
        await thread.call(lambda: None)
    thread.stop()
    assert thread.engine.pool.num_free == thread.engine.pool.num_blocks
