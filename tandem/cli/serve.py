"""`tandem serve`: the whole service, on this machine until Ctrl-C, or on a Ray cluster."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from tandem.cli.cluster import AUTO, WAIT_S, serve_on_ray
from tandem.cli.console import ready_line, reported
from tandem.cli.options import LogOptions, ServedOptions
from tandem.client import ServiceStatus
from tandem.errors import ConfigError
from tandem.launch.processes import Supervisor
from tandem.process import logs
from tandem.process.entry import on_stop_signals
from tandem.process.standard_streams import never_block

log = logging.getLogger(__name__)


def pool_sizes(prefill: int | None, decode: int | None, colocated: int | None) -> dict[str, Any]:
    """The `serve` section's overrides: beside colocated workers, who play both roles, only those that are asked for."""
    if colocated:
        prefill, decode = prefill or 0, decode or 0
    return {"prefill": prefill, "decode": decode, "colocated": colocated}


@dataclass(frozen=True)
class PoolOptions:
    prefill: Annotated[
        int | None, typer.Option(help="Prefill workers; if nothing is said: 1, or 0 beside colocated ones.")
    ] = None
    decode: Annotated[int | None, typer.Option(help="Decode workers; as many, if nothing is said.")] = None
    colocated: Annotated[int | None, typer.Option(help="Workers that play both roles.")] = None


@dataclass(frozen=True)
class DoorOptions:
    host: Annotated[str | None, typer.Option(help="Address that the router listens on.")] = None
    port: Annotated[int | None, typer.Option(help="The router's port; 0: any free one.")] = None
    http_port: Annotated[
        int | None, typer.Option(help="Port of its OpenAI-compatible HTTP door; 0: any free one, -1: none.")
    ] = None


@dataclass(frozen=True)
class RayOptions:
    ray: Annotated[bool, typer.Option("--ray", help="On a Ray cluster: returns when the service is ready.")] = False
    address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="With --ray: its head; this machine's if not given.")
    ] = None
    wait: Annotated[
        float | None,
        typer.Option(min=0, metavar="SECONDS", help=f"With --ray: for all to serve; {WAIT_S:g} if not given."),
    ] = None


def serve(served: ServedOptions, pools: PoolOptions, doors: DoorOptions, logging: LogOptions, on: RayOptions) -> None:
    """Start a router and its workers on this machine and keep them running. Ctrl-C stops everything.

    With --ray they run on a Ray cluster, and stay until `tandem down`; said again, it changes only what differs.
    """
    never_block()
    with reported():
        if not on.ray and (on.address is not None or on.wait is not None):
            raise ConfigError("--address and --wait belong to --ray")
        settings = served.settings(router=vars(doors), serve=pool_sizes(**vars(pools)), log=logging.section())
        logs.configure(settings.log.level, settings.log.format)
        if on.ray:
            serve_on_ray(settings, AUTO if on.address is None else on.address, WAIT_S if on.wait is None else on.wait)
            return
        # Refuses pools that cannot serve.
        said = logs.relayed if settings.log.format == "json" else "{:>10} │ {}".format
        supervisor = Supervisor(settings, output=lambda name, line: typer.echo(said(name, line), err=True))
        log.info("starting %s", settings.model.served_name)
        asyncio.run(run_until_signal(supervisor, lambda status: typer.echo(ready_line(supervisor.address, status))))
        log.info("stopped")


async def run_until_signal(supervisor: Supervisor, ready: Callable[[ServiceStatus], None]) -> None:
    """Runs the service until SIGINT or SIGTERM; a second signal does not wait for live requests. Raises TandemError."""

    async def run() -> None:
        ready(await supervisor.start())
        await supervisor.wait()

    stop = asyncio.Event()
    on_stop_signals(stop.set, supervisor.hurry)
    running, stopping = asyncio.create_task(run()), asyncio.create_task(stop.wait())
    await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    running.cancel()
    try:
        await running
    except asyncio.CancelledError:
        if not stop.is_set():
            raise
    finally:
        await supervisor.stop()
