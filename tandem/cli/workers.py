"""`tandem drain` and `tandem roles`: what an operator tells a worker that serves, through its router."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated

import typer

from tandem.cli.console import reported
from tandem.cli.options import RouterOption
from tandem.client import Client, WorkerState
from tandem.client.request import DEFAULT_ADDRESS
from tandem.errors import ConfigError, Unavailable
from tandem.types import Role

POLL_S = 0.1
# Heartbeats and the dialling of a token stream, each at most a few seconds.
ROLES_S = 10.0

WorkerArgument = Annotated[str, typer.Argument(metavar="WORKER", help="Its id, as `tandem status` shows it.")]


def drain(
    worker: WorkerArgument,
    router: RouterOption = DEFAULT_ADDRESS,
    wait: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="How long it may take to leave; 0: returns at once.")
    ] = 60.0,
) -> None:
    """Take a worker out of the service: it gets no new work, finishes what is live, and its process ends."""
    with reported(), Client(router) as client:
        client.drain_worker(worker)
        if not wait:
            typer.echo(f"{worker} takes no new work; it leaves when its live requests have ended")
            return
        if not _came_true(client, worker, wait, lambda state: state is None):
            raise Unavailable(f"{worker} still has live requests after {wait:g} s; it leaves when they have ended")
    typer.echo(f"{worker} has left")


def roles(
    worker: WorkerArgument,
    roles: Annotated[str, typer.Argument(metavar="ROLE[,ROLE]", help="prefill, decode, or prefill,decode")],
    router: RouterOption = DEFAULT_ADDRESS,
) -> None:
    """Change which roles a worker plays while it serves; what is live of a dropped role goes on to its end.

    Its process must have the role: one of `tandem worker --role both` has two.
    """
    with reported(), Client(router) as client:
        wanted = _parse_roles(roles)
        client.set_worker_roles(worker, wanted)
        if not _came_true(client, worker, ROLES_S, lambda state: state is not None and state.roles == wanted):
            raise Unavailable(f"{worker} was told to play {roles}, and does not {ROLES_S:g} s later: see its log")
    typer.echo(f"{worker} plays {' and '.join(sorted(wanted, reverse=True))}")


def _parse_roles(text: str) -> frozenset[Role]:
    """Raises ConfigError."""
    names = text.split(",")
    for name in names:
        if name not in list(Role):
            raise ConfigError(f"there is no role {name!r}; roles are {', '.join(Role)}", field="roles")
    return frozenset(map(Role, names))


def _came_true(client: Client, worker_id: str, wait_s: float, so: Callable[[WorkerState | None], bool]) -> bool:
    """Whether it is so, within this time, of the worker as the router sees it; None: it is not there."""
    end_s = time.monotonic() + wait_s
    while True:
        state = next((worker for worker in client.status().workers if worker.worker_id == worker_id), None)
        if so(state) or time.monotonic() > end_s:
            return so(state)
        time.sleep(POLL_S)
