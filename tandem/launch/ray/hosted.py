"""A router or a worker inside a process that belongs to somebody else: in a thread and an event loop of its own."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

from tandem.config import TandemConfig
from tandem.engine.backends.cores import usable_cores
from tandem.errors import Refused, TandemError
from tandem.launch.ray.plan import POOLS, Spec

log = logging.getLogger(__name__)

# A service that crashes sooner than this after its start pauses before it ends its process, which is started again.
STABLE_S, CRASH_PAUSE_S = 60.0, 3.0


class MemberPhase(StrEnum):
    STARTING = "starting"
    SERVING = "serving"
    # Trying again would not help; `Hosted.error` says why.
    FAILED = "failed"
    # Drained, or told to stop.
    LEFT = "left"


@dataclass(frozen=True)
class Node:
    """Where a hosted service runs."""

    ip: str
    # Workers that may share its cores.
    slots: int


class Hosted:
    """Runs one service and tells how it fares. Every method may be called from any thread, and none of them blocks.

    starting ──ready──▶ serving ──drain()──▶ left
       └───────┬───────────┘
               ├─ TandemError: trying again would not help ──▶ failed; the process stays, to say so
               └─ anything else is a crash: the process ends, so that whoever supervises it starts a new one
    """

    def __init__(self, serve: Callable[[Hosted], None], end_process: Callable[[int], object] = os._exit) -> None:
        """`serve` runs in the new thread until it is stopped; it calls `stoppable` and `ready` from its event loop."""
        self.phase = MemberPhase.STARTING
        self.address = self.worker_id = ""
        # Why it failed, and the error's code.
        self.error = self.code = ""
        self._serve = serve
        self._end_process = end_process
        self._lock = threading.Lock()
        self._drain_wanted = False
        self._stop: Callable[[], object] | None = None
        self._since_s = time.monotonic()
        threading.Thread(target=self._run, name="hosted", daemon=True).start()

    def stoppable(self, stop: Callable[[], None]) -> None:
        """From the service's event loop, which `stop` must be called in."""
        with self._lock:
            self._stop = partial(asyncio.get_running_loop().call_soon_threadsafe, stop)
            wanted = self._drain_wanted
        if wanted:
            stop()

    def ready(self, address: str, worker_id: str = "") -> None:
        self.address, self.worker_id = address, worker_id
        self.phase = MemberPhase.SERVING

    def drain(self) -> None:
        """The service finishes what is live and leaves; one that has not started yet leaves as soon as it has."""
        with self._lock:
            self._drain_wanted = True
            stop = self._stop
        if stop is not None:
            with suppress(RuntimeError):  # its loop is closed: it has left
                stop()

    def _run(self) -> None:
        try:
            self._serve(self)
        except TandemError as error:
            log.error("%s", error.message)
            self._fail(error)
        except ImportError as error:
            log.exception("cannot serve here")
            self._fail(Refused(f"Tandem is not whole here ({error}): install tandem[serve,ray]"))
        except BaseException:
            log.exception("the service crashed; its process ends")
            if time.monotonic() - self._since_s < STABLE_S:
                time.sleep(CRASH_PAUSE_S)
            self._end_process(1)
        else:
            self.phase = MemberPhase.LEFT

    def _fail(self, error: TandemError) -> None:
        self.error, self.code = error.message, error.code
        self.phase = MemberPhase.FAILED  # last: whoever sees it reads the others


def serve_spec(text: str, node: Node, hosted: Hosted) -> None:
    """Plays what a spec says, on this node. Raises TandemError when it cannot."""
    spec = Spec.parse(text)
    if spec.pool in POOLS:
        _serve_worker(spec, node, hosted)
    else:
        asyncio.run(_serve_router(spec.config(), hosted))


async def _serve_router(config: TandemConfig, hosted: Hosted) -> None:
    from router.app import serve

    stop = asyncio.Event()
    hosted.stoppable(stop.set)
    await serve(config, stop, hosted.ready)


def _serve_worker(spec: Spec, node: Node, hosted: Hosted) -> None:
    config = on_node(spec.config(), node)
    # Read by OpenMP when torch is imported; Ray sets it to its own idea of this process.
    os.environ["OMP_NUM_THREADS"] = str(config.engine.threads)
    from tandem.launch.worker import worker_kind
    from tandem.worker.main import serve_worker

    serve_worker(
        worker_kind(POOLS[spec.pool]),
        config,
        spec.router,
        lambda host: hosted.stoppable(host.drain),
        lambda host: hosted.ready(host.address, host.worker_id),
    )


def on_node(config: TandemConfig, node: Node) -> TandemConfig:
    """What is left open is filled in: the node's own address, and an even share of its cores."""
    worker = {} if "host" in config.worker.model_fields_set else {"host": node.ip}
    threads = config.engine.threads or max(1, len(usable_cores()) // max(1, node.slots))
    return config.model_copy(
        update={
            "worker": config.worker.model_copy(update=worker),
            "engine": config.engine.model_copy(update={"threads": threads}),
        }
    )
