"""The service on one machine: a router and its workers, each a process of its own, started, watched and stopped."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Self

from tandem.client import AsyncClient, ServiceStatus
from tandem.config import TandemConfig
from tandem.engine.backends.cores import usable_cores
from tandem.engine.backends.cuda.gpus import VARIABLE, share_gpus
from tandem.errors import ConfigError, DeadlineExceeded, TandemError, Unavailable
from tandem.launch.child_process import Backoff, ChildProcess, Output, ProcessSpec
from tandem.launch.cores import share_cores
from tandem.launch.pools import check_pools
from tandem.types import Role

log = logging.getLogger(__name__)

# A process that exits with this code has a wrong configuration: starting it again would change nothing.
CONFIG_EXIT = 2
POLL_S = 0.1
# Added to the children's own drain time before what is left is killed.
STOP_MARGIN_S = 5.0
# Bound of a stop in a hurry: a router takes 2 s at most to tell the clients.
HURRY_S = 3.0
STATUS_S = 5.0
# Said after a worker's report.
WITHOUT = "%s. Starting it again would not help: the service goes on without it"
# Listening on every address, a router is reached by this one from its own machine.
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}


class Supervisor:
    """Runs `serve.prefill`, `serve.decode` and `serve.colocated` workers and their router until told to stop.

        start() ──► running ──► stop()
           │           │  a child crashes: it is started again, after a growing pause
           │           │  a worker leaves (somebody told it to), or exits with code 2 (configuration): it stays away
           │           └─ so does the router, with code 2, or the last worker of a role: failed, wait() raises
           └─ a child crashes before the service is ready, or nobody can play a role, or it takes too long: raises,
              nothing is left behind

    Owns the children, all of which are gone after stop(); each gets the effective configuration in a file of its own.
    """

    def __init__(
        self,
        config: TandemConfig,
        *,
        output: Output | None,
        start_timeout_s: float = 300.0,
        environment: Mapping[str, str] | None = None,
        router_module: str = "router",
        worker_module: str = "tandem.cli.main",
    ) -> None:
        """`output` receives (child's name, line) for what children print; with None, errors quote their last lines."""
        check_pools(config, on_ray=False)
        self._config = config
        self._output = output
        self._start_timeout_s = start_timeout_s
        self._environment = environment
        self._modules = (router_module, worker_module)
        self._children: dict[str, ChildProcess] = {}
        self._watchers: list[asyncio.Task[None]] = []
        self._stopping = False
        # Workers that do not come back: they drained, told by somebody else to stop, or cannot be what they should.
        self._left: set[str] = set()
        # The latter, as long as the start may yet fail and name them.
        self._refused: list[ChildProcess] = []
        self._failure: asyncio.Future[None] | None = None
        # host:port by which this machine reaches the router; known after start().
        self.address = ""

    async def start(self) -> ServiceStatus:
        """Returns when every worker has joined.

        Raises ConfigError or Unavailable, with the last words of the child at fault; then nothing is left running.
        """
        self._failure = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(self._start_timeout_s):
                return await self._start()
        except TimeoutError:
            names = "; ".join([", ".join(self._children), *(child.exit_report() for child in self._refused)])
            await self.stop()
            raise Unavailable(f"the service was not ready within {self._start_timeout_s:g} s ({names})") from None
        except OSError as error:
            await self.stop()
            raise Unavailable(f"cannot start a process: {error.strerror}") from None
        except BaseException:
            await self.stop()
            raise

    async def _start(self) -> ServiceStatus:
        gpus = self._share_gpus()
        await self._start_router()
        for spec in self._worker_specs(gpus):
            await self._launch(spec)
        status = await self._joined()
        if status.http_port:
            self._fix_router(http_port=status.http_port)
        for child in self._refused:
            log.error(WITHOUT, child.exit_report())
        self._watchers = [asyncio.create_task(self._watch(child)) for child in self._staying()]
        return status

    def _staying(self) -> list[ChildProcess]:
        return [child for name, child in self._children.items() if name not in self._left]

    async def _start_router(self) -> None:
        router = await self._launch(ProcessSpec("router", self._modules[0], []))
        listening = await asyncio.shield(router.ready)  # a cancel of ours is none of what `stop` asks for
        if not listening:
            await router.wait()
            raise _early_exit(router)
        host, _, port_text = listening.rpartition(":")
        self.address = f"{_LOOPBACK.get(host, host)}:{port_text}"
        self._fix_router(port=int(port_text))

    def _fix_router(self, **ports: int) -> None:
        """A router that is started again must listen where the workers and clients look for it."""
        router = self._config.router.model_copy(update=ports)
        self._config = self._config.model_copy(update={"router": router})

    def _share_gpus(self) -> list[dict[str, str]]:
        """What each worker's environment says, for it sees its own GPU only. Raises ConfigError."""
        serve, engine = self._config.serve, self._config.engine
        workers = serve.prefill + serve.decode + serve.colocated
        gpus = share_gpus(engine, workers)
        self._config = self._config.model_copy(update={"engine": engine.model_copy(update={"devices": ()})})
        return [{VARIABLE: gpu} for gpu in gpus] or [{} for _ in range(workers)]

    def _worker_specs(self, gpus: list[dict[str, str]]) -> list[ProcessSpec]:
        serve = self._config.serve
        roles = {"prefill": serve.prefill, "decode": serve.decode, "both": serve.colocated}
        names = [
            ("worker" if role == "both" else role, role, index)
            for role, count in roles.items()
            for index in range(count)
        ]
        shares = share_cores(usable_cores(), len(names))
        return [
            ProcessSpec(f"{name}-{index}", self._modules[1], self._worker_args(role, cores), gpu)
            for (name, role, index), cores, gpu in zip(names, shares, gpus, strict=True)
        ]

    def _worker_args(self, role: str, cores: list[int]) -> list[str]:
        args = ["worker", "--role", role, "--router", self.address]
        if self._config.engine.threads:
            return args  # the user has chosen; cores that do not match would only hurt
        return [*args, "--cpus", ",".join(map(str, cores)), "--threads", str(len(cores))]

    async def _joined(self) -> ServiceStatus:
        """Waits until the router lists every worker that can start. Raises when one crashes before, or none can."""
        async with AsyncClient(self.address) as client:
            while True:
                for child in self._staying():
                    if child.returncode is not None:
                        await child.wait()
                        self._do_without(child)
                with suppress(Unavailable, DeadlineExceeded):  # the next look at the children says why
                    status = await client.status()
                    pids = {child.pid for child in self._staying() if child.spec.name != "router"}
                    if pids <= {worker.pid for worker in status.workers}:
                        return status
                await asyncio.sleep(POLL_S)

    def _do_without(self, child: ChildProcess) -> None:
        """While starting. Raises unless it is a worker that cannot start, and others play its roles."""
        if child.returncode != CONFIG_EXIT or child.spec.name == "router":
            raise _early_exit(child)
        self._refused.append(child)
        if self._leave(child.spec.name):
            # Often all for one reason: it is said once.
            raise ConfigError("; ".join({each.error: each.exit_report() for each in self._refused}.values()))

    def _leave(self, name: str) -> frozenset[Role]:
        """A worker stays away: returns the roles that no worker of this service plays any more."""
        before = roles_of(self._children.keys() - self._left)
        self._left.add(name)
        return before - roles_of(self._children.keys() - self._left)

    async def _launch(self, spec: ProcessSpec) -> ChildProcess:
        config = json.dumps(self._config.model_dump())
        child = await ChildProcess.start(spec, self._output, self._environment, config)
        self._children[spec.name] = child
        log.debug("started %s, pid %d", spec.name, child.pid)
        return child

    async def _watch(self, child: ChildProcess) -> None:
        """Starts a crashed child again, for as long as the service runs."""
        backoff = Backoff()
        while True:
            code = await child.wait()
            if self._stopping:
                return
            if code == 0 and child.spec.name != "router":  # drained
                self._note_left(child.spec.name)
                return
            if code == CONFIG_EXIT:
                await self._note_refused(child)
                return
            delay_s = backoff.after(child.lived_s)
            log.warning("%s (pid %d); starting it again in %.1f s", child.exit_report(), child.pid, delay_s)
            await asyncio.sleep(delay_s)
            child = await self._relaunch(child.spec, backoff)

    async def _note_refused(self, child: ChildProcess) -> None:
        """The service goes on while each role is played, be it by somebody else's worker."""
        router = child.spec.name == "router"
        lost = frozenset() if router else self._leave(child.spec.name)
        if not router and (not lost or lost <= await self._played()):
            log.error(WITHOUT, child.exit_report())
        elif self._failure is not None and not self._failure.done():
            self._failure.set_exception(_early_exit(child))

    async def _played(self) -> frozenset[Role]:
        """Roles that workers play now, whoever started them."""
        try:
            async with AsyncClient(self.address, timeout_s=STATUS_S) as client:
                workers = (await client.status()).workers
        except TandemError:
            return frozenset()
        return frozenset(role for worker in workers if not worker.draining for role in worker.roles)

    def _note_left(self, name: str) -> None:
        lost = sorted(self._leave(name))
        if not lost:
            log.info("%s has left", name)
            return
        log.warning(
            "%s has left, and no worker of this service plays %s any more. It is not started again: it was told to "
            "leave. Unless another worker plays it, requests are refused until one joins (tandem worker --role %s "
            "--router %s, with the same model) or the service is started again.",
            name,
            " or ".join(lost),
            "both" if len(lost) > 1 else lost[0],
            self.address,
        )

    async def _relaunch(self, spec: ProcessSpec, backoff: Backoff) -> ChildProcess:
        """Tries until the system has room for a process."""
        while True:
            try:
                return await self._launch(spec)
            except OSError as error:
                delay_s = backoff.after(0)
                log.warning("cannot start %s: %s; trying again in %.1f s", spec.name, error.strerror, delay_s)
                await asyncio.sleep(delay_s)

    async def wait(self) -> None:
        """Returns never; raises ConfigError when a child can no longer run. Cancel it, then stop()."""
        assert self._failure is not None, "start() comes first"
        await asyncio.shield(self._failure)

    def pids(self) -> dict[str, int]:
        """Those of the children that run now, by name."""
        return {name: child.pid for name, child in self._children.items() if child.returncode is None}

    async def stop(self) -> None:
        """SIGTERM to the router, which drains, and then to the workers; bounded waits, SIGKILL to what is left.

        Afterwards no child runs. May be called twice.
        """
        self._stopping = True
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        workers = [child for name, child in self._children.items() if name != "router"]
        if "router" in self._children:
            await _end([self._children["router"]], self._config.router.drain_timeout_s)
        await _end(workers, self._config.worker.drain_timeout_s)
        for child in self._children.values():
            if child.ready.done() and child.ready.result():  # the others are a failed start, which was reported
                child.pass_on_last_words()
        if self._failure is not None and not self._failure.cancel() and not self._failure.cancelled():
            self._failure.exception()  # seen, whether or not anybody waited

    def hurry(self) -> None:
        """For somebody who cannot wait for stop(): the router ends what is live, with an error for each request; what
        has not ended after HURRY_S is killed.
        """
        if "router" in self._children:
            self._children["router"].signal(signal.SIGTERM)  # a second one, or stop() sends that
        asyncio.get_running_loop().call_later(HURRY_S, self.kill)

    def kill(self) -> None:
        """SIGKILL to every child."""
        for child in self._children.values():
            child.signal(signal.SIGKILL)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()


async def _end(children: list[ChildProcess], drain_s: float) -> None:
    for child in children:
        child.signal(signal.SIGTERM)
    waits = [asyncio.create_task(child.wait()) for child in children]
    if not waits:
        return
    _, left = await asyncio.wait(waits, timeout=drain_s + STOP_MARGIN_S)
    if left:
        log.warning("%d children did not stop in time; killing them", len(left))
        for child in children:
            child.signal(signal.SIGKILL)
    await asyncio.gather(*waits)


def roles_of(names: Iterable[str]) -> frozenset[Role]:
    """What the children of these names play."""
    kinds = {name.rpartition("-")[0] for name in names}
    return frozenset(Role) if "worker" in kinds else frozenset(role for role in Role if role in kinds)


def _early_exit(child: ChildProcess) -> TandemError:
    kind: Callable[[str], TandemError] = ConfigError if child.returncode == CONFIG_EXIT else Unavailable
    return kind(child.exit_report())
