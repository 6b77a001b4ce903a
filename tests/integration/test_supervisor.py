"""The supervisor over real processes: what it starts, starts again and ends. Stand-ins play router and worker."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from supervised import (
    BOUND_S,
    ENVIRONMENT,
    Service,
    config_of,
    eventually,
    joined_pids,
    running,
    until_joined,
    workers_of,
)

from tandem.client import AsyncClient
from tandem.errors import ConfigError
from tandem.launch.child_process import Backoff, ChildProcess
from tandem.launch.cores import share_cores
from tandem.launch.processes import Supervisor


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


async def test_each_worker_sees_its_gpu_alone_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    pools = {"prefill": 1, "decode": 2}
    async with running(engine={"device": "cuda", "devices": [2, 0, "GPU-1f"]}, serve=pools) as service:
        told = {name: line for name, line in service.lines if line.startswith("gpu")}
        assert told == {"prefill-0": "gpu 6 []", "decode-0": "gpu 4 []", "decode-1": "gpu GPU-1f []"}
        before = service.supervisor.pids()["decode-1"]
        os.kill(before, signal.SIGKILL)
        await eventually(lambda: service.lines.count(("decode-1", "gpu GPU-1f []")) == 2)


async def test_the_last_worker_of_a_role_that_leaves_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with running(serve={"prefill": 1, "decode": 2}) as service:
        pids = service.supervisor.pids()

        async def leave(name: str) -> logging.LogRecord:
            os.kill(pids[name], signal.SIGTERM)
            told = f"{name} has left"
            await eventually(lambda: told in caplog.text)
            return next(record for record in caplog.records if told in record.getMessage())

        assert (await leave("decode-0")).levelno == logging.INFO
        last = await leave("decode-1")
        assert last.levelno == logging.WARNING
        words = "no worker of this service plays decode any more"
        join = f"tandem worker --role decode --router {service.supervisor.address}"
        assert [part for part in (words, join, "not started again") if part not in last.getMessage()] == []
        assert sorted(service.supervisor.pids()) == ["prefill-0", "router"]


async def test_a_colocated_worker_that_leaves_takes_both_roles(caplog: pytest.LogCaptureFixture) -> None:
    async with running(serve={"prefill": 0, "decode": 0, "colocated": 1}) as service:
        os.kill(service.supervisor.pids()["worker-0"], signal.SIGTERM)
        await eventually(lambda: "plays decode or prefill any more" in caplog.text)
        assert "--role both" in caplog.text


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


async def test_a_worker_that_cannot_run_again_ends_alone_while_others_play_its_roles(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"model": {"name": "crash-later", "path": str(tmp_path)}}
    async with running(serve={"prefill": 0, "decode": 0, "colocated": 2}, **settings) as service:
        (tmp_path / "mark").touch()
        failed = asyncio.create_task(service.supervisor.wait())
        os.kill(service.supervisor.pids()["worker-0"], signal.SIGKILL)
        await eventually(lambda: "worker-0 exited with code 2: the model is gone" in caplog.text)
        assert caplog.records[-1].levelno == logging.ERROR
        await until_joined(service, lambda: {service.supervisor.pids()["worker-1"]})
        assert not failed.done()
        os.kill(service.supervisor.pids()["worker-1"], signal.SIGKILL)
        with pytest.raises(ConfigError, match="worker-1 exited with code 2: the model is gone"):
            await asyncio.wait_for(failed, BOUND_S)


async def test_a_worker_of_somebody_else_is_somebody_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"model": {"name": "crash-later", "path": str(tmp_path)}}
    async with running(serve={"prefill": 0, "decode": 0, "colocated": 1}, **settings) as service:
        (tmp_path / "mark").touch()
        path = tmp_path / "theirs.json"
        path.write_text("{}")
        command = ["worker", "--role", "both", "--router", service.supervisor.address, "--config", str(path)]
        theirs = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "standin_worker", *command, env={**os.environ, **ENVIRONMENT}
        )
        try:
            ours = service.supervisor.pids()["worker-0"]
            await until_joined(service, lambda: {ours, theirs.pid})
            failed = asyncio.create_task(service.supervisor.wait())
            os.kill(ours, signal.SIGKILL)
            await eventually(lambda: "the service goes on without it" in caplog.text)
            assert not failed.done()
            failed.cancel()
        finally:
            theirs.terminate()
            await theirs.wait()


async def test_a_worker_that_cannot_start_is_left_out_and_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"model": {"name": "refuse-one", "path": str(tmp_path)}}
    async with running(serve={"prefill": 0, "decode": 0, "colocated": 2}, **settings) as service:
        assert len(await joined_pids(service.supervisor.address)) == 1
        assert len(service.supervisor.pids()) == 2
        assert caplog.text.count("no memory here") == 1
        assert not any("no memory here" in line for _, line in service.lines)


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
        "import asyncio, json\n"
        "from supervised import running\n"
        "async def main():\n"
        "    async with running(model={'name': 'deaf'}) as service:\n"  # not even SIGTERM helps
        "        print(json.dumps(service.supervisor.pids()), flush=True)\n"
        "        await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    environment = {**os.environ, **ENVIRONMENT, "TMPDIR": str(tmp_path)}
    supervisor = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    with supervisor:
        assert supervisor.stdout is not None
        children = [psutil.Process(pid) for pid in json.loads(supervisor.stdout.readline()).values()]
        supervisor.kill()
    assert len(children) == 3
    _, alive = psutil.wait_procs(children, timeout=BOUND_S)
    assert alive == []
    assert list(tmp_path.iterdir()) == []  # nor does a file stay behind


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
