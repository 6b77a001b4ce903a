"""The sending end of NIXL in a process: one agent, whatever the number of transfers and peers."""

from __future__ import annotations

import logging
import secrets
from collections import OrderedDict
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass

from torch import Tensor

from kv_transfer.messages import Lent
from kv_transfer.nixl_agent import KINDS, Agent, Pieces, Write
from kv_transfer.nixl_driver import Driver
from tandem.errors import Overloaded, TransferFailed

log = logging.getLogger(__name__)

MAX_PEERS = 64


@dataclass(frozen=True)
class Order:
    """Pieces of one pool that go to the pieces beside them in another."""

    # Name of the agent that the other pool is registered with.
    peer: str
    near: Pieces
    near_memory: str
    far: Pieces
    far_memory: str


class NixlWriter:
    """Methods return at once or are awaited in the event loop; those with an underscore run in the driver's thread."""

    def __init__(self, devices: str) -> None:
        # By which receivers know this process.
        self.id = secrets.token_hex(16)
        self._devices = devices
        self._driver = Driver("kv-nixl-send", self._look)
        # Made when it is needed first: nothing listens before.
        self._agent: Agent | None = None
        # Who uses which peer; the peer longest out of use first.
        self._peers: OrderedDict[str, set[object]] = OrderedDict()
        self._under_way: list[tuple[str, Write, Future[None]]] = []

    async def meet(self, user: object, pool: Tensor, lent: Lent, metadata: bytes) -> None:
        """Lets this pool be written to the lender's, until `part`. Raises TransferFailed, Overloaded."""
        await self._driver.call(self._meet, user, pool, lent.agent_id, metadata)

    def part(self, user: object, peer: str) -> None:
        """Whether it met the peer or not: a meeting that was cancelled may be under way."""
        with suppress(TransferFailed):  # closed: it has no peers any more
            self._driver.order(self._part, user, peer)

    def write(self, order: Order) -> Future[None]:
        """From any thread. The result comes when all of it is in the peer's memory; raises TransferFailed."""
        ended: Future[None] = Future()
        ended.set_running_or_notify_cancel()  # whoever waits may be cancelled, the write goes on
        self._driver.order(self._begin, order, ended)
        return ended

    async def cut_off(self, peer: str) -> None:
        """Ends the connection to a peer that takes nothing; writes under way have failed on return."""
        await self._driver.call(self._cut_off, peer)

    async def aclose(self) -> None:
        """Transfers still open fail."""
        await self._driver.aclose(self._close)

    def _meet(self, user: object, pool: Tensor, peer: str, metadata: bytes) -> None:
        if self._agent is None:
            self._agent = Agent(self._devices)
        self._agent.register(pool)
        if peer not in self._peers:
            self._make_room()
            self._agent.meet(peer, metadata)
        self._peers.setdefault(peer, set()).add(user)

    def _make_room(self) -> None:
        if len(self._peers) < MAX_PEERS:
            return
        idle = next((peer for peer, users in self._peers.items() if not users), None)
        if idle is None:
            raise Overloaded(f"KV is on its way to {MAX_PEERS} peers already")
        self._cut_off(idle)

    def _part(self, user: object, peer: str) -> None:
        if peer in self._peers:
            self._peers[peer].discard(user)
            self._peers.move_to_end(peer)

    def _begin(self, order: Order, ended: Future[None]) -> None:
        try:
            if self._agent is None or order.peer not in self._peers:
                raise TransferFailed("the connection by NIXL was cut off")
            kinds = KINDS[order.near_memory], KINDS[order.far_memory]
            write = self._agent.write(order.peer, order.near, kinds[0], order.far, kinds[1])
        except BaseException as error:
            ended.set_exception(error)
            return
        self._under_way.append((order.peer, write, ended))
        self._driver.wake()

    def _look(self) -> bool:
        self._under_way = [each for each in self._under_way if not _has_ended(*each[1:])]
        return bool(self._under_way)

    def _cut_off(self, peer: str) -> None:
        if self._peers.pop(peer, None) is None:
            return
        assert self._agent is not None, "it has met peers"
        self._agent.leave(peer)
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
