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
            call = _JoinCall(host, channel)
            try:
                await call.run()
            except Refused:
                raise
            except TandemError as error:
                why = error.message
        await asyncio.sleep(backoff_s)
        # Not sooner: a service that is stopped ends everywhere at once, the router first. To a worker that leaves this
        # is no news; to another one it is when the router does not come back at once.
        level = logging.DEBUG if host.draining.is_set() else logging.INFO if call.welcomed else logging.WARNING
        log.log(level, "router %s: %s; joining again after %.1f s", router, why, backoff_s)
        backoff_s = FIRST_BACKOFF_S if call.welcomed else min(backoff_s * 2, LONGEST_BACKOFF_S)


class _JoinCall:
    """One Join call."""

    def __init__(self, host: WorkerHost, channel: grpc.aio.Channel) -> None:
        self._host = host
        self._call: Any = registry_pb2_grpc.RegistryStub(channel).Join()
        self.welcomed = False
        # The roles in the last hello; None before the first heartbeat.
        self._announced: frozenset[Role] | None = None

    async def run(self) -> None:
        """Until the stream ends. Raises the router's typed error, or Unavailable."""
        try:
            await self._call.write(self._heartbeat())
            interval_s = await self._welcome()
            log.info("worker %s joined at %s", self._host.worker_id, self._host.address)
            beats = asyncio.create_task(self._send_heartbeats(interval_s))
            try:
                await self._follow()
            finally:
                beats.cancel()
        except grpc.aio.AioRpcError as error:
            raise rpc.error_from_rpc(error) from None
        finally:
            self._host.expected = False
            self._call.cancel()

    async def _welcome(self) -> float:
        directive = await rpc.read(self._call)
        if directive is None:
            raise await rpc.ended(self._call)
        self.welcomed = self._host.expected = True
        self._host.joined.set()
        return float(directive.welcome.heartbeat_interval_ms) / 1000

    async def _send_heartbeats(self, interval_s: float) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._host.heartbeat_due.wait(), interval_s)
            self._host.heartbeat_due.clear()
            try:
                await self._call.write(self._heartbeat())
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                return  # the reading side says why

    async def _follow(self) -> None:
        while (directive := await rpc.read(self._call)) is not None:
            kind = directive.WhichOneof("directive")
            log.info("directive from the router: %s", kind)
            if kind == "drain":
                self._host.drain()
            elif kind == "dismiss":
                self._host.expected = False
            elif kind == "set_roles":
                try:
                    self._host.set_roles(wire.roles_from_wire(list(directive.set_roles.roles)))
                except Refused as error:
                    log.warning("%s", error.message)
        raise await rpc.ended(self._call)

    def _heartbeat(self) -> registry_pb2.Heartbeat:
        host = self._host
        # The first one of a call reports the prefix cache anew.
        changes = host.engine.pool.cache_changes(MAX_CHANGES, restart=self._announced is None)
        # The router routes by the roles in the last hello.
        changed, self._announced = host.roles != self._announced, host.roles
        number = host.next_heartbeat
        host.next_heartbeat += 1
        return registry_pb2.Heartbeat(
            number=number,
            hello=host.hello() if changed else None,
            load=host.load(),
            draining=host.draining.is_set(),
            prefix_cache=wire.cache_changes_to_wire(changes),
        )
