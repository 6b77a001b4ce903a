"""What every worker process has, whatever its roles: one engine, one gRPC server, one link to the router."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

import grpc

from kv_transfer.ends.carrier import Carrier
from kv_transfer.ends.link import MAX_MESSAGE_BYTES
from tandem import __version__, rpc, wire
from tandem.addresses import join_address
from tandem.config import TandemConfig
from tandem.errors import Refused
from tandem.types import EngineRequest, Fingerprint, ModelInfo, Role, SamplingParams
from tandem.v1 import registry_pb2, worker_pb2, worker_pb2_grpc
from tandem.worker.engine_thread import EngineThread
from tandem.worker.reservations import Reservations

Result = TypeVar("Result")

# Reading and hashing a prompt takes about 0.2 µs a token.
LONG_PROMPT_TOKENS = 4096


class RoleService(Protocol):
    """A role of a worker: a gRPC service on its engine."""

    # Full name of its gRPC service.
    name: str

    def add_to_server(self, server: grpc.aio.Server) -> None: ...

    def report_load(self, load: registry_pb2.Load) -> None:
        """Fills in the fields of the heartbeat that this role knows."""

    @property
    def busy(self) -> bool:
        """Whether calls of this role are under way."""

    def close_streams(self) -> None:
        """The worker has drained: what lasts as long as the worker must end by itself now."""

    async def aclose(self) -> None: ...


class WorkerHost:
    """The state that a worker's services share. Lives in the event loop."""

    def __init__(
        self, config: TandemConfig, thread: EngineThread, roles: frozenset[Role], carriers: Sequence[Carrier] = ()
    ) -> None:
        """carriers: by which it moves KV to and from other workers."""
        self.config = config
        self.thread = thread
        self.engine = thread.engine
        self.info: ModelInfo = thread.engine.info
        self.worker_id = f"{'+'.join(sorted(roles))}-{secrets.token_hex(4)}"
        self.instance = secrets.token_hex(16)
        self.roles = roles
        self.reservations = Reservations(thread)
        self.carriers = carriers
        self.services: Mapping[Role, RoleService] = {}
        self.address = ""
        # Where it listens.
        self.port = 0
        # Set when something changed that the router should learn before the next heartbeat is due.
        self.heartbeat_due = asyncio.Event()
        # Number of the heartbeat that is made next: what has happened by now is counted in it.
        self.next_heartbeat = 1
        # Set once a router has taken this worker in.
        self.joined = asyncio.Event()
        # Whether a router may have placed something here that has not come yet: one has this worker in its routing, and
        # has not dismissed it.
        self.expected = False
        # Set when the worker should finish what is live and leave.
        self.draining = asyncio.Event()
        self._checking = asyncio.Lock()
        self._on_free: list[Callable[[], None]] = []
        self._loop = asyncio.get_running_loop()
        self.engine.pool.on_free = self._report_free

    def require_fingerprint(self, message: registry_pb2.Fingerprint, what: str) -> Fingerprint:
        """The fingerprint that a request comes with. Raises Refused unless it is this worker's."""
        fingerprint = wire.fingerprint_from_wire(message)
        difference = self.engine.fingerprint.difference(fingerprint)
        if difference is not None:
            raise Refused(f"the request is for another {what}: {difference}")
        return fingerprint

    async def read(self, message: worker_pb2.EngineRequest) -> EngineRequest:
        """A request that breaks no step. Raises InvalidRequest."""

        def read() -> EngineRequest:
            request = wire.request_from_wire(message)
            self.engine.validate(request)
            return request

        return await _off_the_loop(read, len(message.prompt_ids))

    async def read_prompt(self, message: worker_pb2.EmbedPromptRequest) -> EngineRequest:
        """A prompt that is to be embedded and breaks no step; nothing is sampled. Raises InvalidRequest."""

        def read() -> EngineRequest:
            prompt, sampling = tuple(message.prompt_ids), SamplingParams(max_tokens=1)
            request = EngineRequest(message.request_id, prompt, sampling, cache_salt=message.cache_salt)
            self.engine.validate_prompt(request)
            return request

        return await _off_the_loop(read, len(message.prompt_ids))

    async def name_blocks(self, request: EngineRequest) -> list[bytes]:
        """See Engine.name_blocks."""
        return await _off_the_loop(partial(self.engine.name_blocks, request), len(request.prompt_ids))

    def when_blocks_free(self, callback: Callable[[], None]) -> None:
        """Calls back in the event loop each time blocks return to the pool."""
        self._on_free.append(callback)

    def _report_free(self) -> None:
        """In whatever thread gave the blocks back."""
        self.thread.wake()
        for callback in self._on_free:
            self._loop.call_soon_threadsafe(callback)

    def set_roles(self, roles: frozenset[Role]) -> None:
        """Plays these roles from now on. Raises Refused for a role whose service this process does not have.

        Neither a dropped role nor a draining worker refuses anything: the router places nothing new there, so what
        comes is of a live request.
        """
        missing = roles - self.services.keys()
        if missing:
            raise Refused(f"worker {self.worker_id} cannot play the role {min(missing)}: it has no such service")
        self.roles = roles
        self.heartbeat_due.set()

    def drain(self) -> None:
        """Takes no new work from now on; the process leaves when nothing depends on it any more."""
        self.draining.set()
        self.heartbeat_due.set()

    async def until_idle(self) -> None:
        """Until nothing is live, and the router, if there is one, says that nothing of what it placed is on its way."""
        freed = asyncio.Event()
        self.when_blocks_free(freed.set)
        while self.busy or self.expected:
            # A request's last blocks may come back a moment before its bookkeeping ends: look again soon.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(freed.wait(), 0.05)
            freed.clear()

    @property
    def busy(self) -> bool:
        return (
            self.engine.num_live > 0
            or bool(self.reservations)
            or any(service.busy for service in self.services.values())
        )

    def hello(self) -> registry_pb2.Hello:
        return registry_pb2.Hello(
            worker_id=self.worker_id,
            address=self.address,
            roles=wire.roles_to_wire(self.roles),
            playable=wire.roles_to_wire(frozenset(self.services)),
            model=wire.model_to_wire(self.info),
            version=__version__,
            total_blocks=self.engine.pool.num_blocks,
            transports=[carrier.announcement() for carrier in self.carriers],
            pid=os.getpid(),
            device=self.config.engine.device,
            prefix_cache=self.config.engine.prefix_cache,
            instance=self.instance,
        )

    def load(self) -> registry_pb2.Load:
        engine = self.engine.load
        load = registry_pb2.Load(
            free_blocks=self.engine.pool.num_free,
            quarantined_blocks=self.engine.pool.num_quarantined,
            queued_prompt_tokens=engine.queued_prompt_tokens,
            running_decodes=engine.running,
            waiting_prefills=engine.waiting,
            steps=engine.steps,
            prefix_hit_tokens=engine.prefix_hit_tokens,
            prefix_query_tokens=engine.prefix_query_tokens,
            out_of_memory=engine.out_of_memory,
            reservations=len(self.reservations),
        )
        for service in self.services.values():
            service.report_load(load)
        return load

    async def integrity(self) -> registry_pb2.Integrity:
        """One check at a time: a stranger's many cost no more than one does."""
        async with self._checking:
            report = await asyncio.to_thread(self.engine.pool.check_integrity)
        return registry_pb2.Integrity(
            ok=not report.problem,
            referenced_blocks=report.referenced,
            reservations=len(self.reservations),
            quarantined_blocks=report.quarantined,
            live_sequences=self.engine.num_live,
            problem=report.problem,
        )


async def _off_the_loop(function: Callable[[], Result], prompt_tokens: int) -> Result:
    """In a thread when it takes long (law 6), here when changing threads would take longer."""
    if prompt_tokens < LONG_PROMPT_TOKENS:
        return function()
    return await asyncio.to_thread(function)


class AdminService(worker_pb2_grpc.WorkerAdminServicer):
    def __init__(self, host: WorkerHost) -> None:
        self._host = host

    async def CheckIntegrity(self, request: worker_pb2.CheckIntegrityRequest, context: Any) -> registry_pb2.Integrity:
        return await self._host.integrity()


async def make_worker_server(host: WorkerHost) -> grpc.aio.Server:
    """The worker's server with the services of its roles; bound and announced as host.address. Raises ConfigError."""
    server = rpc.make_server(MAX_MESSAGE_BYTES)
    services = host.services.values()
    for service in services:
        service.add_to_server(server)
    worker_pb2_grpc.add_WorkerAdminServicer_to_server(AdminService(host), server)
    await rpc.add_health(server, (*(service.name for service in services), "tandem.v1.WorkerAdmin"))
    worker = host.config.worker
    host.port = rpc.bind(server, worker.host, worker.port, "worker")
    host.address = worker.advertise or join_address(worker.host, host.port)
    return server
