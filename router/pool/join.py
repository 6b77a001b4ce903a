"""The Registry service: a worker is joined for as long as its Join call lives."""

from __future__ import annotations

import asyncio
from typing import Any

from router.aio import first_of
from router.pool.registry import Registry, Silent
from router.pool.worker import Worker
from tandem import rpc
from tandem.config import RouterConfig
from tandem.errors import Refused, TandemError, Unavailable
from tandem.v1 import registry_pb2, registry_pb2_grpc


class JoinService(registry_pb2_grpc.RegistryServicer):
    def __init__(self, registry: Registry, config: RouterConfig) -> None:
        self._registry = registry
        self._config = config

    async def Join(self, _heartbeats: Any, context: Any) -> None:
        """Raises, towards the worker, the reason for which it is refused or out."""
        first = await self._read(context)
        if first is None or not first.HasField("hello"):
            raise Refused("the first heartbeat must carry hello")
        worker = self._registry.admit(first)
        cause: TandemError = Unavailable("its Join stream broke")
        try:
            await first_of(
                self._heartbeats(worker, context), self._direct(worker, context), worker.serve(), worker.wait_lost()
            )
            cause = Unavailable("it left" if worker.draining else "its connection ended")
        except TandemError as error:
            cause = error
            raise
        finally:
            self._registry.remove(worker, cause)
            await worker.link.close()

    async def _read(self, context: Any) -> registry_pb2.Heartbeat | None:
        """None when the worker has closed its side."""
        try:
            async with asyncio.timeout(self._config.heartbeat_timeout_s):
                heartbeat: registry_pb2.Heartbeat | None = await rpc.read(context)
                return heartbeat
        except TimeoutError:
            raise Silent(f"no heartbeat for {self._config.heartbeat_timeout_s:g} s") from None

    async def _heartbeats(self, worker: Worker, context: Any) -> None:
        while (heartbeat := await self._read(context)) is not None:
            worker.heartbeat(heartbeat)

    async def _direct(self, worker: Worker, context: Any) -> None:
        welcome = registry_pb2.Welcome(heartbeat_interval_ms=round(self._config.heartbeat_interval_s * 1000))
        await context.write(registry_pb2.Directive(welcome=welcome))
        while True:
            await context.write(await worker.directives.get())
