"""What every worker process has, whatever its roles: one engine, one gRPC server, one link to the router."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
from collections import abc
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import grpc

from tandem import __version__, rpc, wire
from tandem.addresses import join_address
from tandem.config import TandemConfig
from tandem.engine.block_pool import BlockTable
from tandem.engine.sequence import EngineEvent, Sequence
from tandem.errors import Refused, TandemError
from tandem.types import EngineRequest, ModelInfo, Role, SamplingParams
from tandem.v1 import registry_pb2, worker_pb2, worker_pb2_grpc
from tandem.worker.engine_thread import EngineThread

log = logging.getLogger(__name__)
Value = TypeVar("Value")
Result = TypeVar("Result")

# Reading and hashing a prompt takes about 0.2 µs a token.
LONG_PROMPT_TOKENS = 4096


class Promise(Protocol):
    """Blocks that the decode role of this very worker reserved: a colocated prefill computes straight into them."""

    request: EngineRequest
    # Of the prompt's full blocks (Engine.name_blocks).
    block_names: abc.Sequence[bytes]
    table: BlockTable

    def listener(self, event: EngineEvent, /) -> None:
        """Gets the sequence's events from the second token on."""

    def begin(self, sequence: Sequence) -> None:
        """The sequence that runs in these blocks. Raises TransferFailed when the promise is not for a local prefill."""

    def abandoned(self) -> None:
        """The first token was the last: there is nothing to hand over."""

    def failed(self, error: TandemError) -> None:
        """The prefill ended before the handoff: the blocks are free. For any state, any number of times."""


class Room(Protocol):
    """A role's services on a worker."""

    role: Role
    # Full name of its gRPC service.
    service: str

    def attach(self, server: grpc.aio.Server) -> None: ...

    def report(self, load: registry_pb2.Load) -> None:
        """Fills in the fields of the heartbeat that this role knows."""

    @property
    def busy(self) -> bool:
        """Whether requests still depend on this role."""

    async def aclose(self) -> None: ...


class WorkerHost:
    """The state that a worker's rooms share. Lives in the event loop."""

    def __init__(self, config: TandemConfig, thread: EngineThread, roles: frozenset[Role]) -> None:
        self.config = config
        self.thread = thread
        self.engine = thread.engine
        self.info: ModelInfo = thread.engine.info
        self.worker_id = f"{'+'.join(sorted(roles))}-{secrets.token_hex(4)}"
        self.instance = secrets.token_hex(16)
        self.roles = roles
        self.draining = False
        # By reservation id.
        self.promises: dict[str, Promise] = {}
        self.rooms: list[Room] = []
        # By which it moves KV to and from other workers.
        self.transports = [registry_pb2.Transport(name="grpc")]
        self.address = ""
        # On which it listens.
        self.port = 0
        # Set when something changed that the router should hear of before the next heartbeat is due.
        self.news = asyncio.Event()
        # Set once a router has taken this worker in.
        self.joined = asyncio.Event()
        # Number of the heartbeat that is made next: what has happened by now is counted in it.
        self.next_heartbeat = 1
        # Whether a router has this worker in its routing now, and whether it has said that nothing comes any more.
        self.linked = False
        self.dismissed = False
        # Set when the worker should finish what is live and leave.
        self.leaving = asyncio.Event()
        self._checking = asyncio.Lock()
        self._blocks_freed: list[Callable[[], None]] = []
        self._idle_for_good: list[Callable[[], None]] = []
        self._loop = asyncio.get_running_loop()
        self.engine.pool.on_free = self._tell_free

    def require(self, role: Role) -> None:
        """Raises Refused for a role that the worker does not play.

        A draining worker refuses nothing: the router places nothing new on it, so what comes is of a live request.
        """
        if role not in self.roles:
            raise Refused(f"worker {self.worker_id} does not play the role {role}")

    async def read(self, message: worker_pb2.EngineRequest) -> EngineRequest:
        """A request that breaks no step. Raises InvalidRequest."""
        return await _off_the_loop(self._read, message, len(message.prompt_ids))

    def _read(self, message: worker_pb2.EngineRequest) -> EngineRequest:
        request = wire.request_from_wire(message)
        self.engine.validate(request)
        return request

    async def read_prompt(self, message: worker_pb2.EmbedPromptRequest) -> EngineRequest:
        """A prompt that is to be embedded and breaks no step; nothing is sampled. Raises InvalidRequest."""
        return await _off_the_loop(self._read_prompt, message, len(message.prompt_ids))

    def _read_prompt(self, message: worker_pb2.EmbedPromptRequest) -> EngineRequest:
        prompt = tuple(message.prompt_ids)
        request = EngineRequest(message.request_id, prompt, SamplingParams(max_tokens=1), cache_salt=message.cache_salt)
        self.engine.validate_prompt(request)
        return request

    async def name_blocks(self, request: EngineRequest) -> list[bytes]:
        """See Engine.name_blocks."""
        return await _off_the_loop(self.engine.name_blocks, request, len(request.prompt_ids))

    def when_blocks_free(self, callback: Callable[[], None]) -> None:
        """Calls back in the event loop each time blocks return to the pool."""
        self._blocks_freed.append(callback)

    def _tell_free(self) -> None:
        """From whatever thread gave the blocks back."""
        self.thread.wake()
        self._loop.call_soon_threadsafe(self._on_free)

    def _on_free(self) -> None:
        for callback in self._blocks_freed:
            callback()

    def set_roles(self, roles: frozenset[Role]) -> None:
        """Plays these roles from now on. Raises Refused for a role whose room this process does not have."""
        missing = roles - {room.role for room in self.rooms}
        if missing:
            raise Refused(f"worker {self.worker_id} cannot play the role {min(missing)}: it has no such service")
        self.roles = roles
        self.news.set()

    def drain(self) -> None:
        """Takes no new work from now on; the process leaves when nothing depends on it any more."""
        self.draining = True
        self.leaving.set()
        self.news.set()

    def when_idle_for_good(self, callback: Callable[[], None]) -> None:
        """Calls back when the worker has drained: what lasts as long as the worker must end by itself now."""
        self._idle_for_good.append(callback)

    def hang_up(self) -> None:
        for callback in self._idle_for_good:
            callback()

    async def until_idle(self) -> None:
        """Until nothing is live, and the router, if there is one, says that nothing of what it placed is on its way."""
        freed = asyncio.Event()
        self.when_blocks_free(freed.set)
        while self.busy or (self.linked and not self.dismissed):
            # A request's last blocks may come back a moment before its bookkeeping ends: look again soon.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(freed.wait(), 0.05)
            freed.clear()

    @property
    def busy(self) -> bool:
        return self.engine.num_live > 0 or any(room.busy for room in self.rooms)

    def hello(self) -> registry_pb2.Hello:
        return registry_pb2.Hello(
            worker_id=self.worker_id,
            address=self.address,
            roles=wire.roles_to_wire(self.roles),
            model=wire.model_to_wire(self.info),
            version=__version__,
            total_blocks=self.engine.pool.num_blocks,
            transports=self.transports,
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
        )
        for room in self.rooms:
            room.report(load)
        return load

    async def integrity(self) -> registry_pb2.Integrity:
        """One check at a time: a stranger's many cost no more than one does."""
        async with self._checking:
            report = await asyncio.to_thread(self.engine.pool.check_integrity)
        load = self.load()
        return registry_pb2.Integrity(
            ok=not report.problem,
            referenced_blocks=report.referenced,
            reservations=load.reservations,
            quarantined_blocks=report.quarantined,
            live_sequences=self.engine.num_live,
            problem=report.problem,
        )


async def _off_the_loop(function: Callable[[Value], Result], value: Value, prompt_tokens: int) -> Result:
    """In a thread when it takes long (law 6), here when changing threads would take longer."""
    if prompt_tokens < LONG_PROMPT_TOKENS:
        return function(value)
    return await asyncio.to_thread(function, value)


class AdminService(worker_pb2_grpc.WorkerAdminServicer):
    def __init__(self, host: WorkerHost) -> None:
        self._host = host

    async def CheckIntegrity(self, request: worker_pb2.CheckIntegrityRequest, context: Any) -> registry_pb2.Integrity:
        return await self._host.integrity()


async def make_worker_server(host: WorkerHost, rooms: list[Room], max_message_bytes: int) -> grpc.aio.Server:
    """The worker's server with every room's services; bound and announced as host.address. Raises ConfigError."""
    server = rpc.make_server(max_message_bytes)
    host.rooms = rooms
    for room in rooms:
        room.attach(server)
    worker_pb2_grpc.add_WorkerAdminServicer_to_server(AdminService(host), server)
    await rpc.add_health(server, (*(room.service for room in rooms), "tandem.v1.WorkerAdmin"))
    worker = host.config.worker
    host.port = rpc.bind(server, worker.host, worker.port, "worker")
    host.address = worker.advertise or join_address(worker.host, host.port)
    return server
