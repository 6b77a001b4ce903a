"""The life of a worker process: load, listen, join, work until told to stop, drain, leave."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import grpc

from kv_transfer.carriers.table import make_carriers
from kv_transfer.ends.carrier import PoolMemory
from tandem.addresses import ANY_ADDRESS, check_listening
from tandem.config import TandemConfig, WorkerConfig
from tandem.engine.backends.backend import DeviceLost, backend_for, first_line, is_lost, tune_process
from tandem.errors import ConfigError, TandemError
from tandem.process import descriptors, logs
from tandem.process.entry import INTERRUPTED, on_stop_signals
from tandem.process.standard_streams import say_last_words
from tandem.types import Role
from tandem.worker.engine_thread import EngineThread
from tandem.worker.host import RoleService, WorkerHost, make_worker_server
from tandem.worker.join import keep_joined

log = logging.getLogger(__name__)

# Between two looks at the engine's device.
WATCH_S = 1.0
# Last words have this long to reach their readers.
LAST_TOKENS_S = 1.0


@dataclass(frozen=True)
class WorkerKind:
    """What a worker process can play."""

    # What it plays from the start; the router may order others that it has a service for (SetRoles).
    roles: frozenset[Role]
    # Builds the service of a role on the worker's host.
    services: Mapping[Role, Callable[[WorkerHost], RoleService]]


def run_worker(kind: WorkerKind, config: TandemConfig, router: str) -> int:
    """The life of a process: a worker until SIGTERM or SIGINT; returns the exit code, for `end_process`.

    2 means that trying again would not help: bad configuration, a refused model, an unwelcome worker.
    """
    logs.configure(config.log.level, config.log.format)
    try:
        serve_worker(
            kind,
            config,
            router,
            lambda host: on_stop_signals(host.drain, host.drain),
            lambda host: print(f"ready {host.address}", flush=True),
        )
    except TandemError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 2
    except DeviceLost as error:
        log.exception("the worker ends: a new one may find its device in order")
        print(f"error: {error}", file=sys.stderr, flush=True)
        say_last_words()
        os._exit(1)  # what CUDA would do at an orderly exit may abort it
    except KeyboardInterrupt:  # while the model loads; later SIGINT drains
        return INTERRUPTED
    return 0


def serve_worker(
    kind: WorkerKind,
    config: TandemConfig,
    router: str,
    started: Callable[[WorkerHost], None],
    ready: Callable[[WorkerHost], None],
) -> None:
    """Loads the model, then serves in an event loop of this thread's own until `WorkerHost.drain`.

    Both callbacks run in that loop: `started` gets the host, to drain it by, before anything is served; `ready` is
    called once a router has taken the worker in. Raises TandemError when trying again would not help.
    """
    descriptors.raise_limit()
    # Before the minutes that a model may take to load.
    check_address(config.worker)
    memory = PoolMemory(config.engine.device, receives=Role.DECODE in kind.services)
    carriers = make_carriers(config, memory)
    tune_process(config.engine)
    try:
        thread = EngineThread(config, memory.allocate)
    except Exception as error:
        if is_lost(error, backend_for(config.engine.device)):
            raise DeviceLost(f"the device is lost: {first_line(error)}") from error
        raise
    # Torch, transformers and the model stay until the end. To look through them for garbage stops every thread for
    # 0.2 s, and takes a second when the process ends.
    gc.freeze()
    try:
        asyncio.run(_serve(kind, partial(WorkerHost, config, thread, kind.roles, carriers), router, started, ready))
    finally:
        thread.stop()


def check_address(worker: WorkerConfig) -> None:
    """Raises ConfigError when the worker could not listen where it should, or nobody could dial it there."""
    if worker.host in ANY_ADDRESS and not worker.advertise:
        raise ConfigError(
            f"worker.host {worker.host} is no address that others can dial: "
            "say worker.advertise (tandem worker --advertise) too",
            field="worker.advertise",
        )
    check_listening("worker", worker.host, worker.port)


async def _serve(
    kind: WorkerKind,
    make_host: Callable[[], WorkerHost],
    router: str,
    started: Callable[[WorkerHost], None],
    ready: Callable[[WorkerHost], None],
) -> None:
    host = make_host()
    started(host)
    host.services = {role: make(host) for role, make in kind.services.items()}
    server = await make_worker_server(host)
    await server.start()
    watch = asyncio.create_task(descriptors.watch_connections(host.port, f"worker {host.worker_id}"))
    host.thread.start()
    try:
        await _work(host, router, server, ready)
    finally:
        watch.cancel()
        await server.stop(grace=None)
        for service in host.services.values():
            await service.aclose()


async def _work(host: WorkerHost, router: str, server: grpc.aio.Server, ready: Callable[[WorkerHost], None]) -> None:
    """Until the host is told to drain, by this process or by a directive of the router.

    Raises Refused when the router does not want this worker, RuntimeError when its engine has crashed: a new process
    may do better.
    """
    crashed = host.thread.crashed
    assert crashed is not None, "the thread was started"
    joined = asyncio.create_task(keep_joined(host, router))
    leaving = asyncio.create_task(_leave(host, server))
    reporting = asyncio.create_task(_report_ready(host, ready))
    watching = asyncio.create_task(watch_device(host))
    try:
        done, _ = await asyncio.wait({joined, leaving, crashed, watching}, return_when=asyncio.FIRST_COMPLETED)
        if crashed in done and not isinstance(error := crashed.exception(), DeviceLost):
            raise RuntimeError("the engine's thread crashed") from error
        for task in done:
            task.result()
    finally:
        tasks = (joined, leaving, reporting, watching)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def watch_device(host: WorkerHost) -> None:
    """Never returns by itself. Raises DeviceLost: a copy of KV may be what met the error, in a worker that steps no
    more because every transfer to it fails.
    """
    if host.config.engine.device == "cpu":
        await asyncio.Event().wait()
    while True:
        await asyncio.sleep(WATCH_S)
        await host.thread.call(host.engine.require_device)


async def _report_ready(host: WorkerHost, ready: Callable[[WorkerHost], None]) -> None:
    await host.joined.wait()
    ready(host)


async def _leave(host: WorkerHost, server: grpc.aio.Server) -> None:
    """Joined to the end: a router that saw the Join stream break would fail what is on its way to it."""
    await host.draining.wait()
    log.info("worker %s drains", host.worker_id)
    try:
        await asyncio.wait_for(host.until_idle(), host.config.worker.drain_timeout_s)
    except TimeoutError:
        log.warning("worker %s leaves with live requests", host.worker_id)
    for service in host.services.values():
        service.close_streams()
    await server.stop(LAST_TOKENS_S)
