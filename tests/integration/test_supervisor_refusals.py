"""A service that cannot start says why, once and in words; and what children say is passed on."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from supervised import BOUND_S, SUPPORT, Service, running

from tandem.config import load_config
from tandem.errors import ConfigError, TandemError, Unavailable
from tandem.launch.child_process import ChildProcess, ProcessSpec
from tandem.launch.processes import Supervisor
from tandem.process.standard_streams import say_lost


async def test_a_start_that_the_system_refuses_is_an_error_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refused(*_: Any) -> ChildProcess:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(ChildProcess, "start", refused)
    with pytest.raises(Unavailable, match="cannot start a process: Cannot allocate memory"):
        await Service().supervisor.start()


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("refuse", ConfigError, r"^(prefill|decode)-0 exited with code 2: config key engine\.device: no such device$"),
        ("crash", Unavailable, r"^(prefill|decode)-0 exited with code 3; what it said last is above$"),
    ],
)
async def test_a_child_that_exits_early_is_reported_once(name: str, kind: type[TandemError], words: str) -> None:
    service = Service(model={"name": name})
    with pytest.raises(kind) as caught:
        await service.supervisor.start()
    await service.supervisor.stop()  # once more does no harm
    assert re.search(words, caught.value.message)
    assert service.supervisor.pids() == {}
    assert not any("config key" in line for _, line in service.lines)
    assert name != "crash" or any(line == "out of luck" for _, line in service.lines)


async def test_the_reason_for_which_no_worker_can_start_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    service = Service(model={"name": "refuse"}, serve={"prefill": 2, "decode": 2})
    with pytest.raises(ConfigError) as caught:
        await service.supervisor.start()
    assert caught.value.message.count("no such device") == 1
    assert not any("no such device" in line for _, line in service.lines)
    assert "no such device" not in caplog.text


async def test_last_words_that_nobody_saw_are_quoted() -> None:
    service = Service(relays=False, model={"name": "crash"})
    with pytest.raises(Unavailable, match=r"exited with code 3; its last lines:\n    out of luck"):
        await service.supervisor.start()


async def test_a_router_that_cannot_start_is_reported() -> None:
    async with running() as first:
        port = int(first.supervisor.address.rpartition(":")[2])
        second = Service(router={"port": port})
        with pytest.raises(TandemError, match=r"router exited with code 1"):
            await asyncio.wait_for(second.supervisor.start(), BOUND_S)
        assert any("port is in use" in line for _, line in second.lines)
        assert second.supervisor.pids() == {}


async def test_a_worker_that_never_joins_is_bounded() -> None:
    service = Service(start_timeout_s=3.0, model={"name": "never-join"})
    with pytest.raises(Unavailable, match="not ready within 3 s"):
        await service.supervisor.start()
    assert service.supervisor.pids() == {}


@pytest.mark.parametrize(
    ("serve", "words"),
    [
        ({"prefill": 0, "decode": 0}, "no workers"),
        ({"prefill": 1, "decode": 0}, "nobody would play decode"),
        ({"prefill": 0, "decode": 1}, "nobody would play prefill"),
    ],
)
def test_pools_that_cannot_serve_are_refused(serve: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Service(serve=serve)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"router": {"transport": "nixl"}}, "router.transport nixl needs worker.nixl_devices"),
        ({"router": {"transport": "ray"}}, "router.transport ray needs .* tandem serve --ray"),
        ({"router": {"transport": "shm"}, "engine": {"device": "cuda"}}, "router.transport shm needs KV pools in"),
    ],
)
def test_a_transport_that_these_workers_cannot_have_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Supervisor(load_config(overrides=settings), output=None)
    alone = {"serve": {"prefill": 0, "decode": 0, "colocated": 1}}  # has no KV to send
    Supervisor(load_config(overrides=settings | alone), output=None)


async def test_more_workers_than_gpus_are_refused() -> None:
    service = Service(engine={"device": "cuda"}, serve={"prefill": 64, "decode": 64})
    with pytest.raises(ConfigError, match="128 workers need a GPU each, and this machine shows"):
        await service.supervisor.start()
    assert service.supervisor.pids() == {}


@pytest.mark.parametrize("worker", [{"port": 9000}, {"advertise": "10.0.0.1:9000"}])
def test_an_address_for_one_worker_is_refused_for_two(worker: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"worker.{min(worker)} can belong to one worker only"):
        Supervisor(load_config(overrides={"worker": worker}), output=None)


async def test_an_error_that_was_not_the_last_word_is_passed_on(tmp_path: Path) -> None:
    (tmp_path / "chatty.py").write_text("print('error: not so bad'); print('on it goes'); print('error: the end')")
    lines: list[str] = []
    path = f"{tmp_path}{os.pathsep}{SUPPORT.parents[1]}"
    child = await ChildProcess.start(
        ProcessSpec("chatty", "chatty", []), lambda _, line: lines.append(line), {"PYTHONPATH": path}
    )
    await asyncio.wait_for(child.wait(), BOUND_S)
    assert lines == ["error: not so bad", "on it goes"]
    child.pass_on_last_words()
    assert lines[2:] == ["error: the end"]
    assert child.exit_report() == "chatty exited with code 0: the end"
    child.pass_on_last_words()
    assert len(lines) == 3


@pytest.mark.parametrize("flood", [1, 1 << 20])
async def test_long_lines_and_bad_bytes_pass(flood: int, tmp_path: Path) -> None:
    (tmp_path / "noisy.py").write_text(f"import sys; sys.stdout.buffer.write(b'x' * {flood} + b'\\xff\\nlast')")
    lines: list[str] = []
    spec = ProcessSpec("noisy", "noisy", [])
    child = await ChildProcess.start(
        spec, lambda _, line: lines.append(line), {"PYTHONPATH": f"{tmp_path}{os.pathsep}{SUPPORT.parents[1]}"}
    )
    assert await asyncio.wait_for(child.wait(), BOUND_S) == 0
    assert "".join(lines) == "x" * flood + "\ufffdlast"
    assert lines[-1] == "last"
    assert await child.ready == ""


async def test_a_child_is_gone_though_one_of_its_own_holds_its_pipes(tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(
        "import subprocess, time\n"
        "print(subprocess.Popen(['sleep', '60']).pid, flush=True)\n"
        "print('ready here', flush=True)\n"
        "time.sleep(60)\n"
    )
    lines: list[str] = []
    child = await ChildProcess.start(
        ProcessSpec("parent", "parent", []),
        lambda _, line: lines.append(line),
        {"PYTHONPATH": f"{tmp_path}{os.pathsep}{SUPPORT.parents[1]}"},
    )
    assert await asyncio.wait_for(child.ready, BOUND_S) == "here"
    child.signal(signal.SIGKILL)
    assert await asyncio.wait_for(child.wait(), BOUND_S) == -signal.SIGKILL
    os.kill(int(lines[0]), signal.SIGKILL)  # it was still there


async def test_an_output_that_fails_is_no_reason_to_lose_sight_of_a_child(tmp_path: Path) -> None:
    (tmp_path / "talker.py").write_text("for number in range(1000): print(number)\nprint('the end')")
    lines: list[str] = []
    space = itertools.count()

    def output(_: str, line: str) -> None:
        if next(space) < 900:
            raise OSError(errno.ENOSPC, "No space left on device")
        lines.append(line)

    spec = ProcessSpec("talker", "talker", [])
    child = await ChildProcess.start(spec, output, {"PYTHONPATH": f"{tmp_path}{os.pathsep}{SUPPORT.parents[1]}"})
    assert await asyncio.wait_for(child.wait(), BOUND_S) == 0
    assert lines == [say_lost(900), *map(str, range(900, 1000)), "the end"]
