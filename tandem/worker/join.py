"""Keeps a worker joined to its router: heartbeats out, directives in, again and again until it leaves."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import grpc

from tandem import rpc, wire
from tandem.errors import Refused, TandemError
from tandem.prefix import MAX_CHANGES
from tandem.types import Role
from tandem.v1 import registry_pb2, registry_pb2_grpc
from tandem.worker.host import WorkerHost

log = logging.getLogger(__name__)

FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 0.2, 5.0


async def keep_joined(host: WorkerHost, router: str) -> None:
    """Never returns by itself: rejoins with back-off whenever the router goes away. Raises Refused when unwelcome."""
    backoff_s, why = FIRST_BACKOFF_S, ""
    while True:
        async with rpc.make_channel(router) as channel:
            link = _Link(host, channel)
            try:
                await link.run()
            except Refused:
                raise
            except TandemError as error:
                why = error.message
        await asyncio.sleep(backoff_s)
        # Not sooner: a service that is stopped ends everywhere at once, the router first. To a worker that leaves this
        # is no news; to another one it is when the router does not come back at once.
        level = logging.DEBUG if host.draining else logging.INFO if link.welcomed else logging.WARNING
        log.log(level, "router %s: %s; joining again after %.1f s", router, why, backoff_s)
        backoff_s = FIRST_BACKOFF_S if link.welcomed else min(backoff_s * 2, LONGEST_BACKOFF_S)


class _Link:
    """One Join call."""

    def __init__(self, host: WorkerHost, channel: grpc.aio.Channel) -> None:
        self._host = host
        self._call: Any = registry_pb2_grpc.RegistryStub(channel).Join()
        self.welcomed = False
        # The roles in the last hello.
        self._told: frozenset[Role] = frozenset()
        # Whether the first heartbeat has been made: it begins to tell the prefix cache anew.
        self._begun = False

    async def run(self) -> None:
        """Until the stream ends. Raises the router's typed error, or Unavailable."""
        try:
            await self._call.write(self._heartbeat(hello=self._hello()))
            interval_s = await self._welcome()
            log.info("worker %s joined at %s", self._host.worker_id, self._host.address)
            beats = asyncio.create_task(self._beat(interval_s))
            try:
                await self._obey()
            finally:
                beats.cancel()
        except grpc.aio.AioRpcError as error:
            raise rpc.error_from_rpc(error) from None
        finally:
            self._host.linked = self._host.dismissed = False
            self._call.cancel()

    async def _welcome(self) -> float:
        directive = await rpc.read(self._call)
        if directive is None:
            raise await rpc.ended(self._call)
        self.welcomed = self._host.linked = True
        self._host.joined.set()
        return float(directive.welcome.heartbeat_interval_ms) / 1000

    async def _beat(self, interval_s: float) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._host.news.wait(), interval_s)
            self._host.news.clear()
            # The router routes by the roles in the last hello.
            changed = self._host.roles != self._told
            try:
                await self._call.write(self._heartbeat(hello=self._hello() if changed else None))
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                return  # the reading side says why

    async def _obey(self) -> None:
        while (directive := await rpc.read(self._call)) is not None:
            kind = directive.WhichOneof("directive")
            log.info("directive from the router: %s", kind)
            if kind == "drain":
                self._host.drain()
            elif kind == "dismiss":
                self._host.dismissed = True
            elif kind == "set_roles":
                self._set_roles(directive.set_roles)
        raise await rpc.ended(self._call)

    def _set_roles(self, message: registry_pb2.SetRoles) -> None:
        try:
            self._host.set_roles(wire.roles_from_wire(list(message.roles)))
        except Refused as error:
            log.warning("%s", error.message)

    def _hello(self) -> registry_pb2.Hello:
        self._told = self._host.roles
        return self._host.hello()

    def _heartbeat(self, hello: registry_pb2.Hello | None = None) -> registry_pb2.Heartbeat:
        first, self._begun = not self._begun, True
        changes = self._host.engine.pool.cache_changes(MAX_CHANGES, restart=first)
        number = self._host.next_heartbeat
        self._host.next_heartbeat += 1
        return registry_pb2.Heartbeat(
            number=number,
            hello=hello,
            load=self._host.load(),
            draining=self._host.draining,
            prefix_cache=wire.cache_changes_to_wire(changes),
        )
