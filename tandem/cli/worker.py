"""`tandem worker`: one worker process, joined to a router."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

import typer

from tandem.cli.console import reported
from tandem.cli.options import AdvertiseOption, LogOptions, RouterOption, ServedOptions
from tandem.engine.backends.cores import usable_cores
from tandem.engine.backends.cuda.gpus import take_gpu
from tandem.errors import ConfigError
from tandem.launch.cores import pin
from tandem.process.entry import end_process, starting
from tandem.process.standard_streams import never_block
from tandem.types import Role


class WorkerRole(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"

    @property
    def roles(self) -> frozenset[Role]:
        return frozenset(Role) if self is WorkerRole.BOTH else frozenset({Role(self.value)})


def parse_cpus(text: str) -> list[int]:
    """From '0,1'. Raises ConfigError for what is no core that this process may use."""
    usable = usable_cores()
    try:
        cores = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise ConfigError(f"--cpus takes core numbers such as 0,1, not {text!r}", field="cpus") from None
    wrong = [core for core in cores if core not in usable]
    if wrong:
        raise ConfigError(f"--cpus: this process may not use core {wrong[0]}, only {usable}", field="cpus")
    return cores


def parse_gpu(text: str | None) -> list[int | str] | None:
    """For engine.devices, which checks it."""
    return None if text is None else [int(text) if text.isdecimal() else text]


@dataclass(frozen=True)
class PlaceOptions:
    """Where it runs and listens."""

    threads: Annotated[int | None, typer.Option(help="Torch threads; 0: one per core it may use.")] = None
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0: any free one.")] = None
    advertise: AdvertiseOption = None
    cpus: Annotated[str | None, typer.Option(metavar="0,1", help="Keep to these cores.")] = None
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="0", help="Its GPU, as in engine.devices; else the first, which others that say none take too."
        ),
    ] = None


def worker(
    role: Annotated[WorkerRole, typer.Option(help="What it plays; both is a colocated worker.")],
    router: RouterOption,
    served: ServedOptions,
    place: PlaceOptions,
    logging: LogOptions,
) -> None:
    """Run one worker and join it to a router. `tandem serve` does this for you on one machine."""
    never_block()
    with reported():
        settings = served.settings(
            engine={"threads": place.threads, "devices": parse_gpu(place.gpu)},
            worker={"host": place.host, "port": place.port, "advertise": place.advertise},
            log=logging.section(),
        )
        if place.cpus is not None:
            pin(parse_cpus(place.cpus))
        take_gpu(settings.engine)
        # Not before either: it imports torch, which counts the cores it may use.
        with starting():
            from tandem.launch.worker import worker_kind
            from tandem.worker.main import run_worker

        end_process(run_worker(worker_kind(role.roles), settings, router))
