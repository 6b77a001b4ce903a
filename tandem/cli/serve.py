"""`tandem serve`: the whole service, on this machine until Ctrl-C, or on a Ray cluster."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Annotated, Any

import typer

from tandem.cli.cluster import AUTO, WAIT_S, serve_on_ray
from tandem.cli.common import (
    ConfigOption,
    Device,
    LoadFormat,
    LogFormatOption,
    LogLevelOption,
    ModelOption,
    ready_line,
    reported,
)
from tandem.client import ServiceStatus
from tandem.config import load_config
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


def serve(
    model: ModelOption = None,
    prefill: Annotated[
        int | None, typer.Option(help="Prefill workers; if nothing is said: 1, or 0 beside colocated ones.")
    ] = None,
    decode: Annotated[int | None, typer.Option(help="Decode workers; as many, if nothing is said.")] = None,
    colocated: Annotated[int | None, typer.Option(help="Workers that play both roles.")] = None,
    config: ConfigOption = None,
    device: Annotated[Device | None, typer.Option(help="Where the engines run.")] = None,
    load_format: Annotated[LoadFormat | None, typer.Option(help="dummy: random weights, for load tests.")] = None,
    host: Annotated[str | None, typer.Option(help="Address that the router listens on.")] = None,
    port: Annotated[int | None, typer.Option(help="The router's port; 0: any free one.")] = None,
    http_port: Annotated[
        int | None, typer.Option(help="Of its OpenAI-compatible HTTP door; 0: any free one, -1: none.")
    ] = None,
    log_level: LogLevelOption = None,
    log_format: LogFormatOption = None,
    ray: Annotated[bool, typer.Option("--ray", help="On a Ray cluster: returns when the service is ready.")] = False,
    address: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="With --ray: its head; this machine's if not given."),
    ] = None,
    wait: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="SECONDS",
            help=f"With --ray: for all to serve; {WAIT_S:g} if not given.",
        ),
    ] = None,
) -> None:
    """Start a router and its workers on this machine and keep them running. Ctrl-C stops everything.

    With --ray they run on a Ray cluster, and stay until `tandem down`; said again, it changes only what differs.
    """
    never_block()
    with reported():
        if not ray and (address is not None or wait is not None):
            raise ConfigError("--address and --wait belong to --ray")
        settings = load_config(
            config,
            {
                "model": {"path": model, "load_format": load_format},
                "engine": {"device": device},
                "router": {"host": host, "port": port, "http_port": http_port},
                "serve": pool_sizes(prefill, decode, colocated),
                "log": {"level": log_level, "format": log_format},
            },
        )
        logs.configure(settings.log.level, settings.log.format)
        if ray:
            serve_on_ray(settings, AUTO if address is None else address, WAIT_S if wait is None else wait)
            return
        # Refuses pools that cannot serve.
        supervisor = Supervisor(settings, output=_relay_json if settings.log.format == "json" else _relay)
        log.info("starting %s", settings.model.served_name)
        asyncio.run(run_until_signal(supervisor, lambda status: typer.echo(ready_line(supervisor.address, status))))
        log.info("stopped")


def _relay(name: str, line: str) -> None:
    typer.echo(f"{name:>10} │ {line}", err=True)


def _relay_json(name: str, line: str) -> None:
    typer.echo(logs.relayed(name, line), err=True)


async def run_until_signal(supervisor: Supervisor, ready: Callable[[ServiceStatus], None]) -> None:
    """Runs the service until SIGINT or SIGTERM; a second signal does not wait for live requests. Raises TandemError."""
    stop = asyncio.Event()
    on_stop_signals(stop.set, supervisor.hurry)
    running, stopping = asyncio.create_task(_run(supervisor, ready)), asyncio.create_task(stop.wait())
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


async def _run(supervisor: Supervisor, ready: Callable[[ServiceStatus], None]) -> None:
    ready(await supervisor.start())
    await supervisor.wait()
