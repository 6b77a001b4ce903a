"""A worker's place in the pool: a real Join stream that beats, and may fall silent."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from typing import Any

import grpc

import tandem
from tandem import rpc, wire
from tandem.errors import TandemError
from tandem.types import Fingerprint, ModelInfo, Role
from tandem.v1 import registry_pb2, registry_pb2_grpc

FINGERPRINT = Fingerprint("config", "weights", "float32", 16, 2, 2, 8, 1)
# Its vectors hold 2 numbers.
MODEL = ModelInfo("tiny", 4096, 512, (0,), FINGERPRINT, 2)
SHM, GRPC = (registry_pb2.Transport(name=name) for name in ("shm", "grpc"))


class ScriptedMember:
    def __init__(
        self,
        router: str,
        worker_id: str,
        roles: Sequence[Role],
        model: ModelInfo = MODEL,
        version: str = "",
        total_blocks: int = 1000,
        transports: Sequence[registry_pb2.Transport] = (SHM, GRPC),
        address: str = "",
    ) -> None:
        """address: what it says, if not where it listens."""
        self.router = router
        self.id, self.roles, self.model = worker_id, frozenset(roles), model
        self.version, self.total_blocks, self.transports = version or tandem.__version__, total_blocks, transports
        self.address = address
        # What a process makes at its start.
        self.instance = secrets.token_hex(16)
        self.load = registry_pb2.Load(free_blocks=total_blocks)
        self.directives: list[registry_pb2.Directive] = []
        self.join_error: TandemError | None = None
        # Silent: no heartbeats. Tests that read join_error ask for it first: a write that meets the end of the call
        # makes grpc.aio forget the status that the router sent ("Internal error from Core").
        self.silent = self.draining = False
        self.beats, self.next_heartbeat = 0, 1

    def open(self, port: int) -> None:
        self.address = self.address or f"127.0.0.1:{port}"
        self.channel = rpc.make_channel(self.router)
        self.joining = asyncio.create_task(self._join())

    async def close(self) -> None:
        """Nothing is said to the router."""
        self.joining.cancel()
        await asyncio.gather(self.joining, return_exceptions=True)
        await self.channel.close(None)

    def hello(self) -> registry_pb2.Hello:
        return registry_pb2.Hello(
            worker_id=self.id,
            address=self.address,
            roles=wire.roles_to_wire(self.roles),
            playable=wire.roles_to_wire(frozenset(Role)),
            model=wire.model_to_wire(self.model),
            version=self.version,
            total_blocks=self.total_blocks,
            transports=self.transports,
            prefix_cache=True,
            instance=self.instance,
        )

    async def _join(self) -> None:
        self.call: Any = registry_pb2_grpc.RegistryStub(self.channel).Join()
        try:
            await self.beat(self.hello())
            reader = asyncio.create_task(self._read_directives())
            try:
                while not reader.done():
                    await asyncio.wait({reader}, timeout=0.05)
                    if not self.silent and not reader.done():
                        await self.beat()
                await reader
            finally:
                reader.cancel()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await self._note_error()

    async def _note_error(self) -> None:
        self.join_error = rpc.error_from_rpc(
            grpc.aio.AioRpcError(
                await self.call.code(),
                await self.call.initial_metadata(),
                await self.call.trailing_metadata(),
                await self.call.details(),
            )
        )

    async def beat(self, hello: registry_pb2.Hello | None = None) -> None:
        number = self.next_heartbeat
        self.next_heartbeat += 1
        await self.call.write(
            registry_pb2.Heartbeat(hello=hello, load=self.load, draining=self.draining, number=number)
        )
        self.beats += 1

    async def _read_directives(self) -> None:
        while (directive := await self.call.read()) is not grpc.aio.EOF:
            self.directives.append(directive)

    async def leave(self) -> None:
        await self.call.done_writing()
