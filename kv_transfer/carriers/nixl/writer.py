"""The sending end of NIXL in a process: one agent, whatever the number of transfers and peers."""

from __future__ import annotations

import secrets
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from torch import Tensor

from kv_transfer.carriers.nixl.agent import Agent, Pieces, Write
from kv_transfer.carriers.nixl.driver import Driver
from kv_transfer.carriers.nixl.messages import Lent
from kv_transfer.ends.idle_pool import IdlePool
from tandem.errors import TransferFailed

MAX_PEERS = 64


class NixlWriter:
    """Methods return at once or are awaited in the event loop; those with an underscore run in the driver's thread."""

    def __init__(self, devices: str) -> None:
        # By which receivers know this process.
        self.id = secrets.token_hex(16)
        self._devices = devices
        self._driver = Driver("kv-nixl-send", self._poll)
        # Made when it is needed first: nothing listens before.
        self._agent: Agent | None = None
        # Agents that this one is connected to, by name.
        self._peers: IdlePool[str, str] = IdlePool(
            MAX_PEERS, self._disconnect, f"KV is on its way to {MAX_PEERS} peers already"
        )
        self._under_way: list[tuple[str, Write, Future[None]]] = []

    @property
    def under_way(self) -> int:
        """Writes that have not ended."""
        return len(self._under_way)

    async def connect(self, user: object, pool: Tensor, lent: Lent, metadata: bytes) -> None:
        """Lets this pool be written to the lender's, until `leave`. Raises TransferFailed, Overloaded."""
        await self._driver.call(self._connect, user, pool, lent.agent_id, metadata)

    def leave(self, user: object, peer: str) -> None:
        """Whether it is connected or not: a connecting that was cancelled may be under way."""
        with suppress(TransferFailed):  # closed: it has no peers any more
            self._driver.submit(self._peers.leave, peer, user)

    def write(self, peer: str, near: Pieces, near_kind: str, far: Pieces, far_kind: str) -> Future[None]:
        """From any thread, as Agent.write. The result comes when all of it is in the peer's memory; raises
        TransferFailed."""
        ended: Future[None] = Future()
        ended.set_running_or_notify_cancel()  # whoever waits may be cancelled, the write goes on
        self._driver.submit(self._begin, ended, peer, near, near_kind, far, far_kind)
        return ended

    async def disconnect(self, peer: str) -> None:
        """Ends the connection to a peer that takes nothing; writes under way have failed on return."""
        await self._driver.call(self._cut_off, peer)

    async def aclose(self) -> None:
        """Transfers still open fail."""
        await self._driver.aclose(self._close)

    def _connect(self, user: object, pool: Tensor, peer: str, metadata: bytes) -> None:
        agent = self._agent = self._agent or Agent(self._devices)
        agent.register(pool)

        def connect() -> str:
            agent.connect(peer, metadata)
            return peer

        self._peers.enter(peer, user, connect)

    def _begin(self, ended: Future[None], peer: str, *pieces: Any) -> None:
        try:
            if self._agent is None or peer not in self._peers.kept:
                raise TransferFailed("the connection by NIXL was cut off")
            begun = self._agent.write(peer, *pieces)
        except BaseException as error:
            ended.set_exception(error)
            return
        self._under_way.append((peer, begun, ended))
        self._driver.wake()

    def _poll(self) -> bool:
        self._under_way = [each for each in self._under_way if not _has_ended(*each[1:])]
        return bool(self._under_way)

    def _cut_off(self, peer: str) -> None:
        if self._peers.kept.pop(peer, None) is not None:
            self._disconnect(peer)

    def _disconnect(self, peer: str) -> None:
        assert self._agent is not None, "it is connected"
        self._agent.disconnect(peer)
        # Whatever NIXL says of them now: that nothing more can arrive is for the receiver to see to.
        for _, _, ended in (each for each in self._under_way if each[0] == peer):
            ended.set_exception(TransferFailed("the connection by NIXL was cut off"))
        self._under_way = [each for each in self._under_way if each[0] != peer]

    def _close(self) -> None:
        for _, _, ended in self._under_way:
            ended.set_exception(TransferFailed("the transport was closed in mid-transfer"))
        self._under_way.clear()
        if self._agent is not None:
            self._agent.close()


def _has_ended(write: Write, ended: Future[None]) -> bool:
    try:
        if not write.ended():
            return False
    except TransferFailed as error:
        ended.set_exception(error)
    else:
        ended.set_result(None)
    return True
