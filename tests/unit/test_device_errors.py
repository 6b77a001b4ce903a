"""What a step does when its device has no room, or is lost. The errors are planted, all else is real."""

from __future__ import annotations

import asyncio
import os
import select
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_driver import EngineDriver

from tandem.config import TINY_MODEL, parse_config
from tandem.engine.backends.backend import DeviceLost, backend_for, is_lost
from tandem.engine.backends.cpu.fusion import unfuse_layers
from tandem.engine.engine import Engine
from tandem.engine.scheduler import Chunk, StepPlan
from tandem.engine.sequence import Failed, KVWritten, NewToken, Sequence, Started
from tandem.engine.step_room import GOOD_STEPS, LEAST_TOKENS
from tandem.errors import InternalError, OutOfMemory
from tandem.out_of_memory import is_out_of_memory
from tandem.types import EmbedParams, EngineRequest, Pooling, SamplingParams
from tandem.worker import main
from tandem.worker.engine_thread import EngineThread

CPU = backend_for("cpu")
PROMPTS = [list(range(5, 45)), [7, 8, 9], list(range(60, 77)), [11] * 5]
PARAMS = [
    SamplingParams(max_tokens=5, ignore_eos=True),
    SamplingParams(max_tokens=5, ignore_eos=True, temperature=0.9, seed=5, repetition_penalty=1.3),
    SamplingParams(max_tokens=5, ignore_eos=True, temperature=0.9, top_p=0.8, seed=6),
    SamplingParams(max_tokens=5, ignore_eos=True, frequency_penalty=0.4, logprobs=2),
]


def plant(engine: Engine, fails: Callable[[StepPlan, int], Exception | None]) -> None:
    """fails: what goes wrong in a layer of a step, once its KV is written."""
    run = engine._runner.run

    def planted(plan: StepPlan, layer_written: Callable[[int], None]) -> Any:
        def written(layer: int) -> None:
            layer_written(layer)
            if (error := fails(plan, layer)) is not None:
                raise error

        return run(plan, written)

    engine._runner.run = planted  # type: ignore[method-assign,assignment]


def no_room_for(tokens: int, layer: int) -> Callable[[StepPlan, int], Exception | None]:
    return lambda plan, at: torch.OutOfMemoryError() if plan.num_tokens > tokens and at == layer else None


@pytest.mark.parametrize(("room", "layer"), [(1, 0), (2, 1), (7, 1)])
def test_a_step_without_room_is_done_in_parts(room: int, layer: int) -> None:
    wanted = EngineDriver(TINY_MODEL, kv_memory_mib=4).generate(PROMPTS, PARAMS)
    driver = EngineDriver(TINY_MODEL, frame_bytes=4096, kv_memory_mib=4)
    plant(driver.engine, no_room_for(room, layer))
    assert driver.generate(PROMPTS, PARAMS) == wanted
    assert driver.engine.load.out_of_memory > 0
    assert driver.engine._scheduler.max_step_tokens == LEAST_TOKENS
    assert driver.engine.pool.check_integrity().referenced == driver.engine.num_live == 0
    # Every prompt is begun once, and each layer of its KV told once.
    layers = driver.engine.fingerprint.num_layers
    for index, prompt in enumerate(PROMPTS):
        events = [event for sequence, event in driver.emissions if sequence.request.request_id == str(index)]
        assert sum(isinstance(event, Started) for event in events) == 1
        told = [event for event in events if isinstance(event, KVWritten)]
        cells = [(at, token) for event in told for at in event.layers for token in range(event.start, event.end)]
        assert sorted(cells) == [(at, token) for at in range(layers) for token in range(len(prompt))]


def test_want_of_memory_that_passes_is_forgotten() -> None:
    driver = EngineDriver(TINY_MODEL, kv_memory_mib=4, max_step_tokens=256)
    scheduler = driver.engine._scheduler
    short = [True]
    plant(driver.engine, lambda plan, layer: torch.OutOfMemoryError() if short and plan.num_tokens > 50 else None)
    driver.add("long", [5] * 200, SamplingParams(max_tokens=1))
    driver.run()
    assert scheduler.max_step_tokens == LEAST_TOKENS
    failed = driver.engine.load.out_of_memory
    short.clear()
    endless = SamplingParams(max_tokens=2 * GOOD_STEPS, ignore_eos=True)
    driver.add("decodes", [5], endless)
    limits = []
    while driver.engine.has_work:
        driver.engine.step()
        limits.append(scheduler.max_step_tokens)
    assert limits == [64] * (GOOD_STEPS - 1) + [128] * GOOD_STEPS + [256]
    assert driver.engine.load.out_of_memory == failed > 0
    # As large as configured, never larger.
    driver.add("more", [6], endless)
    driver.run()
    assert scheduler.max_step_tokens == 256


def test_a_small_step_without_room_makes_no_smaller_ones() -> None:
    """Something else took the memory for a moment: a step of two decodes is no reason for steps of one."""
    driver = EngineDriver(TINY_MODEL, kv_memory_mib=4)
    errors: list[Exception] = [torch.OutOfMemoryError()]
    plant(driver.engine, lambda plan, layer: errors.pop() if errors and len(plan.decodes) == 2 else None)
    driver.generate([[5, 6], [7, 8]], SamplingParams(max_tokens=4, ignore_eos=True))
    assert driver.engine.load.out_of_memory == 1
    assert driver.engine._scheduler.max_step_tokens == LEAST_TOKENS
    steps = driver.engine.load.steps
    driver.generate([[5, 6], [7, 8]], SamplingParams(max_tokens=4, ignore_eos=True))
    assert driver.engine.load.steps == steps + 4


@pytest.mark.parametrize("fused", [True, False])
def test_what_others_were_told_of_is_not_written_again(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sender may be reading it; computed in another batch, its bits could differ."""
    driver = EngineDriver(TINY_MODEL, frame_bytes=4096, kv_memory_mib=4)
    if not fused:
        unfuse_layers(driver.engine._runner._model)
    pool = driver.engine.cache.pool
    mark = 0.5
    errors: list[Exception] = [torch.OutOfMemoryError()]

    def fails(plan: StepPlan, layer: int) -> Exception | None:
        if layer == 0 or not errors:
            return None
        pool[0].fill_(mark)  # no second write is mistaken for the first
        return errors.pop()

    plant(driver.engine, fails)
    driver.add("a", PROMPTS[0], SamplingParams(max_tokens=1))
    driver.run()
    assert driver.engine.load.out_of_memory == 1
    assert bool((pool[0] == mark).all())
    assert not bool((pool[1] == mark).any())


def test_embeddings_come_whole_out_of_parts() -> None:
    def vectors(driver: EngineDriver) -> list[bytes]:
        driver.emissions.clear()
        for prompt in PROMPTS:
            request = EngineRequest("e", tuple(prompt), SamplingParams(max_tokens=1))
            embed = EmbedParams(pooling=Pooling.MEAN)
            driver.engine.add(Sequence(request, lambda event: None, decode_here=False, embed=embed))
        driver.run()
        return [event.vector for _, event in driver.emissions if hasattr(event, "vector")]

    wanted = vectors(EngineDriver(TINY_MODEL, kv_memory_mib=4))
    driver = EngineDriver(TINY_MODEL, kv_memory_mib=4)
    plant(driver.engine, no_room_for(9, 1))
    got = vectors(driver)
    assert len(got) == len(wanted) == len(PROMPTS)
    for one, other in zip(got, wanted, strict=True):
        here, there = (torch.frombuffer(bytearray(vector), dtype=torch.float32) for vector in (one, other))
        assert torch.allclose(here, there, atol=1e-5)


def test_a_request_that_has_no_room_alone_fails_alone() -> None:
    driver = EngineDriver(TINY_MODEL, kv_memory_mib=4)

    def fails(plan: StepPlan, layer: int) -> Exception | None:
        hungry = any(chunk.sequence.request.request_id == "hungry" for chunk in plan.chunks)
        return torch.OutOfMemoryError() if hungry else None

    plant(driver.engine, fails)
    driver.add("hungry", [5, 6, 7], PARAMS[0])
    driver.add("modest", [8, 9], PARAMS[0])
    driver.run()
    assert isinstance(driver.failures["hungry"], OutOfMemory)
    assert "modest" not in driver.failures
    assert len(driver.tokens["modest"]) == 5
    assert driver.engine.pool.check_integrity().referenced == driver.engine.num_live == 0


def test_halves_are_the_plan() -> None:
    names = "abcde"
    rows = {name: Sequence(EngineRequest(name, (1,) * 50, PARAMS[0]), lambda event: None, True) for name in names}
    for prefills in ([], [("d", 0, 9)], [("d", 3, 4), ("e", 0, 31)]):
        for decodes in ("", "a", "abc"):
            spans = [*((name, 50, 51) for name in decodes), *prefills]
            plan = StepPlan([Chunk(rows[name], start, end) for name, start, end in spans])
            first, second = plan.halves()
            assert first.num_tokens - second.num_tokens in (0, 1)
            assert [*first.decodes, *second.decodes] == plan.decodes
            cells = [
                [(chunk.sequence, token) for chunk in half.chunks for token in range(chunk.start, chunk.end)]
                for half in (first, second, plan)
            ]
            assert cells[0] + cells[1] == cells[2]


def test_a_lost_device_ends_the_engine_and_a_bug_the_step() -> None:
    driver = EngineDriver(TINY_MODEL, kv_memory_mib=4)
    errors: list[Exception] = [ValueError("a bug")]
    plant(driver.engine, lambda plan, layer: errors.pop() if errors else None)
    driver.add("first", [5, 6, 7], PARAMS[0])
    driver.run()
    assert isinstance(driver.failures["first"], InternalError)

    errors.append(torch.AcceleratorError("CUDA error: an illegal memory access was encountered"))
    driver.add("second", [5, 6, 7], PARAMS[0])
    with pytest.raises(DeviceLost, match="illegal memory access"):
        driver.run()
    assert not [event for _, event in driver.emissions if isinstance(event, NewToken | Failed)][1:]


def test_which_errors_are_which() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError())
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.AcceleratorError("CUDA error: out of memory"))
    assert not is_out_of_memory(torch.AcceleratorError("CUDA error: device-side assert triggered"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    with pytest.raises(RuntimeError) as of_the_host:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(of_the_host.value)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_lost(torch.AcceleratorError("CUDA error: out of memory"), CPU)
    assert not is_lost(RuntimeError("shapes do not match"), CPU)
    wrapped = RuntimeError("cannot load")
    wrapped.__cause__ = torch.AcceleratorError("CUDA error: unspecified launch failure")
    assert is_lost(wrapped, CPU)


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), ValueError("bug")])
def test_any_error_is_the_devices_end_when_it_answers_no_more(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert not is_lost(error, backend_for("cuda"))

    def gone() -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", gone)
    assert is_lost(error, backend_for("cuda"))
    engine = Engine(parse_config({"engine": {"kv_memory_mib": 4}}), print)
    engine.require_device()
    engine.backend = backend_for("cuda")
    with pytest.raises(DeviceLost):
        engine.require_device()


def test_the_reason_is_heard_by_a_reader_that_is_late() -> None:
    code = """
from tandem.process.standard_streams import never_block; never_block()
import sys
from tandem.config import parse_config
from tandem.worker import main
def lose(*_):
    print("x" * 300_000, file=sys.stderr)
    raise main.DeviceLost("CUDA error: gone")
main.serve_worker = lose
main.run_worker(None, parse_config({}), "")
"""
    ours, theirs = os.pipe()
    with subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2], stderr=theirs) as process:
        os.close(theirs)
        assert select.select([ours], [], [], 60)[0]
        got: list[bytes] = []
        with open(ours, "rb") as rest:
            late = threading.Timer(0.2, lambda: got.append(rest.read()))
            late.start()
            assert process.wait(30) == 1
            late.join()
    assert got[0].count(b"x") >= 300_000
    assert got[0].endswith(b"\nerror: CUDA error: gone\n")


async def test_an_idle_worker_looks_after_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transfers meet errors too, and a worker to which none succeeds steps no more."""
    thread = EngineThread(parse_config({"engine": {"kv_memory_mib": 4}}))
    thread.start()
    host: Any = SimpleNamespace(
        config=parse_config({"engine": {"device": "cuda"}}), thread=thread, engine=thread.engine
    )
    monkeypatch.setattr(main, "WATCH_S", 0.01)
    try:
        watch = asyncio.create_task(main.watch_device(host))
        assert not (await asyncio.wait({watch}, timeout=0.2))[0]
        monkeypatch.setattr(thread.engine.backend, "why_lost", lambda: "CUDA error: gone")
        with pytest.raises(DeviceLost, match="CUDA error: gone"):
            await asyncio.wait_for(watch, 30)
    finally:
        thread.stop()
