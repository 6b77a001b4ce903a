"""The supervisor over real processes. Stand-ins (tests/support) play router and worker, so that no model is needed."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import standin_router

from tandem.client import AsyncClient
from tandem.config import TandemConfig, load_config
from tandem.errors import ConfigError, TandemError, Unavailable
from tandem.launch.child_process import Backoff, ChildProcess, ProcessSpec
from tandem.launch.cores import share_cores
from tandem.launch.processes import Supervisor

SUPPORT = Path(standin_router.__file__).parent
ENVIRONMENT = {"PYTHONPATH": os.pathsep.join([str(SUPPORT), str(SUPPORT.parents[1])])}
BOUND_S = 30.0


class Service:
    """A supervisor with stand-ins, and what they said."""

    def __init__(self, **settings: dict[str, Any]) -> None:
        self.lines: list[tuple[str, str]] = []
        self.supervisor = Supervisor(
            config_of(**settings),
            output=lambda name, line: self.lines.append((name, line)),
            start_timeout_s=BOUND_S,
            environment=ENVIRONMENT,
            router_module="standin_router",
            worker_module="standin_worker",
        )

    def args_of(self, name: str) -> list[str]:
        return next(line.split()[1:] for who, line in self.lines if who == name and line.startswith("args"))


def config_of(**settings: dict[str, Any]) -> TandemConfig:
    return load_config(overrides={"router": {"port": 0}, "worker": {"drain_timeout_s": 0.0}, **settings})


@asynccontextmanager
async def running(**settings: dict[str, Any]) -> AsyncIterator[Service]:
    service = Service(**settings)
    await service.supervisor.start()
    pids = service.supervisor.pids()
    try:
        yield service
    finally:
        pids |= service.supervisor.pids()
        await service.supervisor.stop()
        assert not [pid for pid in pids.values() if psutil.pid_exists(pid)]


async def eventually(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(BOUND_S):
        while not holds():
            await asyncio.sleep(0.02)


async def joined_pids(address: str) -> set[int]:
    async with AsyncClient(address) as client:
        try:
            return {worker.pid for worker in (await client.status()).workers}
        except Unavailable:
            return set()


async def until_joined(service: Service, pids: Callable[[], set[int]]) -> None:
    async with asyncio.timeout(BOUND_S):
        while not pids() or await joined_pids(service.supervisor.address) != pids():
            await asyncio.sleep(0.02)


def workers_of(service: Service) -> set[int]:
    return {pid for name, pid in service.supervisor.pids().items() if name != "router"}


async def test_starts_names_and_stops_everything() -> None:
    async with running(serve={"prefill": 1, "decode": 2, "colocated": 1}) as service:
        pids = service.supervisor.pids()
        assert sorted(pids) == ["decode-0", "decode-1", "prefill-0", "router", "worker-0"]
        assert await joined_pids(service.supervisor.address) == workers_of(service)
        assert "both" in service.args_of("worker-0")
        assert ("prefill-0", 'config {"prefill":1,"decode":2,"colocated":1}') in service.lines


async def test_a_killed_worker_comes_back() -> None:
    async with running() as service:
        before = service.supervisor.pids()
        os.kill(before["decode-0"], signal.SIGKILL)
        await eventually(lambda: service.supervisor.pids().get("decode-0", before["decode-0"]) != before["decode-0"])
        await until_joined(service, lambda: workers_of(service))
        after = service.supervisor.pids()
        assert after["decode-0"] not in before.values()
        assert after["prefill-0"] == before["prefill-0"]


async def test_a_restart_that_the_system_refuses_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    refusals = iter([errno.ENOMEM, errno.EAGAIN])
    start = ChildProcess.start

    async def refused_twice(*args: Any) -> ChildProcess:
        if (number := next(refusals, None)) is not None:
            raise OSError(number, os.strerror(number))
        return await start(*args)

    monkeypatch.setattr(Backoff, "FIRST_S", 0.01)
    async with running() as service:
        before = service.supervisor.pids()["decode-0"]
        monkeypatch.setattr(ChildProcess, "start", refused_twice)
        os.kill(before, signal.SIGKILL)
        await eventually(lambda: service.supervisor.pids().get("decode-0", before) != before)
        assert next(refusals, None) is None


async def test_a_start_that_the_system_refuses_is_an_error_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refused(*_: Any) -> ChildProcess:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(ChildProcess, "start", refused)
    with pytest.raises(Unavailable, match="cannot start a process: Cannot allocate memory"):
        await Service().supervisor.start()


async def test_a_killed_router_comes_back_at_the_same_addresses() -> None:
    async with running(router={"port": 0, "http_port": 0}) as service:
        before, address = service.supervisor.pids(), service.supervisor.address
        http_port = await http_port_of(service)
        os.kill(before["router"], signal.SIGKILL)
        await eventually(lambda: service.supervisor.pids().get("router", before["router"]) != before["router"])
        await until_joined(service, lambda: workers_of(service))
        assert service.supervisor.address == address
        assert await http_port_of(service) == http_port
        assert workers_of(service) == {before["prefill-0"], before["decode-0"]}


async def http_port_of(service: Service) -> int:
    async with AsyncClient(service.supervisor.address) as client:
        return (await client.status()).http_port


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


async def test_last_words_that_nobody_saw_are_quoted() -> None:
    service = Service(model={"name": "crash"})
    service.supervisor._output = None
    with pytest.raises(Unavailable, match=r"exited with code 3; its last lines:\n    out of luck"):
        await service.supervisor.start()


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
    assert child.report() == "chatty exited with code 0: the end"
    child.pass_on_last_words()
    assert len(lines) == 3


async def test_a_router_that_cannot_start_is_reported() -> None:
    async with running() as first:
        port = int(first.supervisor.address.rpartition(":")[2])
        second = Service(router={"port": port})
        with pytest.raises(TandemError, match=r"router exited with code 1"):
            await asyncio.wait_for(second.supervisor.start(), BOUND_S)
        assert any("port is in use" in line for _, line in second.lines)
        assert second.supervisor.pids() == {}


async def test_a_worker_that_never_joins_is_bounded() -> None:
    service = Service(model={"name": "never-join"})
    service.supervisor._start_timeout_s = 3.0
    with pytest.raises(Unavailable, match="not ready within 3 s"):
        await service.supervisor.start()
    assert service.supervisor.pids() == {}


async def test_a_configuration_error_after_a_restart_ends_the_service(tmp_path: Path) -> None:
    settings = {"model": {"name": "crash-later", "path": str(tmp_path)}}
    async with running(serve={"prefill": 0, "decode": 0, "colocated": 1}, **settings) as service:
        os.kill(service.supervisor.pids()["worker-0"], signal.SIGKILL)
        with pytest.raises(ConfigError, match="the model is gone"):
            await asyncio.wait_for(service.supervisor.wait(), BOUND_S)


async def test_a_deaf_child_is_killed() -> None:
    service = Service(model={"name": "deaf"})
    await service.supervisor.start()
    pids = service.supervisor.pids()
    await asyncio.wait_for(service.supervisor.stop(), BOUND_S)
    assert not [pid for pid in pids.values() if psutil.pid_exists(pid)]


@pytest.mark.parametrize("children", [1, 3], ids=["the router starts", "workers start"])
async def test_cancelling_the_start_leaves_nothing(children: int) -> None:
    service = Service(model={"name": "never-join"})
    starting = asyncio.create_task(service.supervisor.start())
    await eventually(lambda: len(service.supervisor.pids()) == children)
    pids = service.supervisor.pids()
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    await service.supervisor.stop()  # as `tandem serve` does after a Ctrl-C
    assert not [pid for pid in pids.values() if psutil.pid_exists(pid)]


def test_children_end_with_a_killed_supervisor(tmp_path: Path) -> None:
    """A supervisor in a process of its own gets SIGKILL, which it cannot answer; its children must end."""
    code = (
        "import asyncio, json, test_supervisor as t\n"
        "async def main():\n"
        "    async with t.running(model={'name': 'deaf'}) as service:\n"  # not even SIGTERM helps
        "        print(json.dumps(service.supervisor.pids()), flush=True)\n"
        "        await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    path = os.pathsep.join([ENVIRONMENT["PYTHONPATH"], str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": path, "TMPDIR": str(tmp_path)}
    supervisor = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    with supervisor:
        assert supervisor.stdout is not None
        children = [psutil.Process(pid) for pid in json.loads(supervisor.stdout.readline()).values()]
        supervisor.kill()
    assert len(children) == 3
    _, alive = psutil.wait_procs(children, timeout=BOUND_S)
    assert alive == []
    assert list(tmp_path.iterdir()) == []  # nor does a file stay behind


@pytest.mark.parametrize("flood", [1, 1 << 20])
async def test_long_lines_and_bad_bytes_pass(flood: int, tmp_path: Path) -> None:
    (tmp_path / "noisy.py").write_text(f"import os; os.write(1, b'x' * {flood} + b'\\xff\\nlast')")
    lines: list[str] = []
    spec = ProcessSpec("noisy", "noisy", [])
    child = await ChildProcess.start(
        spec, lambda _, line: lines.append(line), {"PYTHONPATH": f"{tmp_path}{os.pathsep}{SUPPORT.parents[1]}"}
    )
    assert await asyncio.wait_for(child.wait(), BOUND_S) == 0
    assert "".join(lines) == "x" * flood + "\ufffdlast"
    assert lines[-1] == "last"
    assert await child.ready == ""


def test_backoff_doubles_to_its_limit_and_starts_again_after_a_stable_minute() -> None:
    backoff = Backoff()
    assert [backoff.after(1.0) for _ in range(8)] == [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert [backoff.after(60.0), backoff.after(1.0)] == [0.5, 1]


@pytest.mark.parametrize(
    ("cores", "workers", "shares"),
    [
        ([0, 1], 2, [[0], [1]]),
        ([0, 1, 2, 3], 2, [[0, 1], [2, 3]]),
        ([4, 5, 6], 2, [[4], [5, 6]]),
        ([0, 1], 3, [[0], [1], [0]]),
        ([0, 1, 2, 3], 1, [[0, 1, 2, 3]]),
    ],
)
def test_cores_are_shared_evenly(cores: list[int], workers: int, shares: list[list[int]]) -> None:
    assert share_cores(cores, workers) == shares


async def test_workers_get_cores_and_as_many_threads_unless_told_otherwise() -> None:
    async with running() as service:
        args = service.args_of("prefill-0")
        cpus, threads = args[args.index("--cpus") + 1], args[args.index("--threads") + 1]
        assert len(cpus.split(",")) == int(threads)
    async with running(engine={"threads": 3}) as service:
        assert "--cpus" not in service.args_of("prefill-0")


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


@pytest.mark.parametrize("worker", [{"port": 9000}, {"advertise": "10.0.0.1:9000"}])
def test_an_address_for_one_worker_is_refused_for_two(worker: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"worker.{min(worker)} can belong to one worker only"):
        Supervisor(load_config(overrides={"worker": worker}), output=None)


async def test_a_service_that_stops_has_nothing_to_say() -> None:
    """The real one: no worker looks for the router that ends beside it."""
    lines: list[str] = []
    pools = {"prefill": 1, "decode": 1, "colocated": 0}
    router = {"port": 0, "http_port": -1}
    settings = config_of(router=router, engine={"kv_memory_mib": 32}, serve=pools, worker={"drain_timeout_s": 10.0})
    supervisor = Supervisor(settings, output=lambda name, line: lines.append(f"{name}: {line}"))
    await supervisor.start()
    told = len(lines)
    await supervisor.stop()
    assert [line for line in lines[told:] if " INFO " not in line] == []
    assert any("drains" in line for line in lines[told:])
