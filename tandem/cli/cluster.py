"""`tandem serve --ray`, `tandem scale`, `tandem down`: the service on a Ray cluster."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from tandem.cli.console import ready_line, reported
from tandem.config import TandemConfig
from tandem.errors import ConfigError
from tandem.launch.ray.plan import parse_counts

if TYPE_CHECKING:
    from tandem.launch.ray.cluster import Cluster

AUTO, WAIT_S = "auto", 120.0

AddressOption = Annotated[
    str, typer.Option("--address", metavar="HOST:PORT", help="The Ray head; auto: the cluster of this machine.")
]
WaitOption = Annotated[
    float, typer.Option("--wait", min=0, metavar="SECONDS", help="How long new members may take until they serve.")
]


def serve_on_ray(config: TandemConfig, address: str, wait_s: float) -> None:
    with _cluster(address) as cluster:
        typer.echo(ready_line(*cluster.serve(config, wait_s)))


def scale(
    pools: Annotated[list[str], typer.Argument(metavar="POOL=N...", help="prefill=3 decode=2 colocated=0")],
    address: AddressOption = AUTO,
    wait: WaitOption = WAIT_S,
) -> None:
    """Change how many workers a service on Ray has, while it serves: new ones join, leaving ones finish their work."""
    with reported():
        counts = parse_counts(pools)
        with _cluster(address) as cluster:
            typer.echo(ready_line(*cluster.scale(counts, wait)))


def down(address: AddressOption = AUTO) -> None:
    """Stop the service on Ray: no new requests, live ones finish within bounds. The Ray cluster stays."""
    with reported(), _cluster(address) as cluster:
        typer.echo("stopped" if cluster.down() else "nothing is running")


@contextmanager
def _cluster(address: str) -> Iterator[Cluster]:
    try:
        from tandem.launch.ray.cluster import connected
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "ray":
            raise
        raise ConfigError(
            "Ray is not installed here: in a checkout, `make cluster-node` "
            "or pip install -c constraints.txt -e '.[serve,ray]'"
        ) from None
    # In this order: connecting, Ray takes the signals for itself.
    with connected(address, lambda line: typer.echo(line, err=True)) as cluster, _ending_by_signals():
        yield cluster


@contextmanager
def _ending_by_signals() -> Iterator[None]:
    """A command that is told to end, or whose terminal is gone, takes back what it began, as on Ctrl-C.

    Ray's own handlers would end the process at once.
    """

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    ours = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, end) for number in ours}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
