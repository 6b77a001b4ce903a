"""The life of a worker process: load, listen, join, work until told to stop, drain, leave."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import grpc

from tandem.config import TandemConfig, load_config
from tandem.engine.process import tune_process
from tandem.errors import TandemError
from tandem.types import Role
from tandem.worker.engine_thread import EngineThread
from tandem.worker.host import Room, WorkerHost, make_worker_server
from tandem.worker.join import keep_joined

log = logging.getLogger(__name__)

# Builds the rooms of a worker on its host.
MakeRooms = Callable[[WorkerHost], list[Room]]
# Last words have this long to reach their readers.
HANG_UP_S = 1.0
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def run_rooms(
    config: TandemConfig, roles: frozenset[Role], router: str, make_rooms: MakeRooms, max_message_bytes: int
) -> int:
    """Runs a worker until SIGTERM or SIGINT; returns the exit code.

    2 means that trying again would not help: bad configuration, a refused model, an unwelcome worker.
    """
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    try:
        tune_process(config.engine)
        thread = EngineThread(config)
        asyncio.run(_serve(config, roles, router, thread, make_rooms, max_message_bytes))
    except TandemError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 2
    return 0


async def _serve(
    config: TandemConfig,
    roles: frozenset[Role],
    router: str,
    thread: EngineThread,
    make_rooms: MakeRooms,
    max_message_bytes: int,
) -> None:
    host = WorkerHost(config, thread, roles)
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, host.drain)
    rooms = make_rooms(host)
    server = await make_worker_server(host, rooms, max_message_bytes)
    await server.start()
    thread.start()
    try:
        await _work(host, router, server)
    finally:
        await server.stop(grace=None)
        for room in rooms:
            await room.aclose()
        thread.stop()


async def _work(host: WorkerHost, router: str, server: grpc.aio.Server) -> None:
    """Until a signal or a drain directive.

    Raises Refused when the router does not want this worker, RuntimeError when its engine has crashed: a new process
    may do better.
    """
    crashed = host.thread.crashed
    assert crashed is not None, "the thread was started"
    joined = asyncio.create_task(keep_joined(host, router))
    leaving = asyncio.create_task(_leave(host, server))
    ready = asyncio.create_task(_say_ready(host))
    try:
        done, _ = await asyncio.wait({joined, leaving, crashed}, return_when=asyncio.FIRST_COMPLETED)
        if crashed in done:
            raise RuntimeError("the engine's thread crashed") from crashed.exception()
        if joined in done:
            joined.result()
    finally:
        for task in (joined, leaving, ready):
            task.cancel()
        await asyncio.gather(joined, leaving, ready, return_exceptions=True)


async def _say_ready(host: WorkerHost) -> None:
    await host.joined.wait()
    print(f"ready {host.address}", flush=True)


async def _leave(host: WorkerHost, server: grpc.aio.Server) -> None:
    """Joined to the end: a router that saw the Join stream break would fail what is on its way to it."""
    await host.leaving.wait()
    log.info("worker %s drains", host.worker_id)
    try:
        await asyncio.wait_for(host.until_idle(), host.config.worker.drain_timeout_s)
    except TimeoutError:
        log.warning("worker %s leaves with live requests", host.worker_id)
    host.hang_up()
    await server.stop(HANG_UP_S)


def parse_arguments(description: str | None) -> tuple[TandemConfig, str]:
    """The command line of `python -m prefill_worker` and `python -m decode_worker`: configuration and router."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--router", required=True, metavar="HOST:PORT", help="the router to join")
    parser.add_argument("--config", type=Path, help="YAML file with sections model, engine, worker")
    parser.add_argument("--model", help="directory or hub id")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--host", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on (default: any free one)")
    parser.add_argument("--advertise", metavar="HOST:PORT", help="how others reach this worker")
    given = parser.parse_args()
    overrides = {
        "model": {"path": given.model},
        "engine": {"device": given.device},
        "worker": {"host": given.host, "port": given.port, "advertise": given.advertise},
    }
    try:
        return load_config(given.config, overrides), given.router
    except TandemError as error:
        parser.exit(2, f"error: {error.message}\n")
