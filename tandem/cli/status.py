"""`tandem status`: the service as its router sees it, and the proof that nothing is held for nobody."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from tandem.cli.console import human_bytes, make_console, reported
from tandem.cli.options import RouterOption
from tandem.client import Client, ServiceStatus, WorkerState
from tandem.client.request import DEFAULT_ADDRESS


def status(
    router: RouterOption = DEFAULT_ADDRESS,
    integrity: Annotated[
        bool,
        typer.Option(
            "--integrity", help="Every worker checks its pool; exit code 1 if one is not in order, or missing."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show pools, roles, load, free blocks and live requests."""
    with reported(), Client(router) as client:
        found = client.status(check_integrity=integrity)
    problems = found.problems() if integrity else []
    if as_json:
        typer.echo(json.dumps({**asdict(found), "problems": problems}, default=sorted))
    else:
        show_status(make_console(), found, integrity)
    for problem in problems:
        typer.echo(f"tandem: {problem}", err=True)
    if problems:
        raise typer.Exit(1)


def show_status(console: Console, found: ServiceStatus, integrity: bool) -> None:
    models = ", ".join(model.name for model in found.models) or "none yet"
    console.print(
        f"tandem {found.version}, up {found.uptime_ms / 1000:.0f} s, model {models}; requests: "
        f"{found.live_requests} live, {found.finished_requests} finished, {found.cancelled_requests} cancelled, "
        f"{found.failed_requests} failed",
        markup=False,
    )
    if not found.workers:
        console.print("no worker is ready")
        return
    console.print(_workers_table(found, integrity))
    joined = {worker.worker_id for worker in found.workers}
    for request in found.requests:
        # A request that decodes outlives the worker that computed its prompt.
        names = (request.prefill_worker, request.decode_worker)
        way = " → ".join(name if name in joined else f"{name} (gone)" if name else "-" for name in names)
        console.print(
            f"  {request.request_id}  {request.phase}, {request.age_ms / 1000:.1f} s old, {way}", markup=False
        )


def _workers_table(found: ServiceStatus, integrity: bool) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    headers = ["worker", "roles", "address", "device", "free blocks", "cached", "queued", "running", "reserved"]
    for header in [*headers, "KV out/in", "heartbeat", *(["pool"] if integrity else [])]:
        table.add_column(header)
    for worker in sorted(found.workers, key=lambda worker: (sorted(worker.roles), worker.worker_id)):
        table.add_row(*_row(worker), *([_pool(worker)] if integrity else []))
    return table


def _row(worker: WorkerState) -> list[str]:
    load = worker.load

    def moved(transport: str) -> str:
        out, back = (side[transport].bytes if transport in side else 0 for side in (load.kv_sent, load.kv_received))
        return f"{transport} {human_bytes(out)} / {human_bytes(back)}"

    return [
        worker.worker_id,
        "+".join(sorted(worker.roles, reverse=True)) + (" (draining)" if worker.draining else ""),
        worker.address,
        worker.device,
        f"{load.free_blocks}/{worker.total_blocks}",
        str(worker.cached_blocks),
        f"{load.queued_prompt_tokens} tokens",
        str(load.running_decodes),
        str(load.reservations),
        "\n".join(map(moved, worker.transports)),
        f"{worker.heartbeat_age_ms:.0f} ms ago",
    ]


def _pool(worker: WorkerState) -> str:
    found = worker.integrity
    if found is None:
        return "not checked"
    state = "in order" if found.ok else "NOT IN ORDER"
    return f"{state}: {found.referenced_blocks} referenced, {found.reservations} reserved"
