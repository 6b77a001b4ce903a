"""The receiving agents of a worker: one for each process that writes into its pool by NIXL."""

from __future__ import annotations

import asyncio
import logging
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from torch import Tensor

from kv_transfer.carriers.nixl.agent import Agent
from kv_transfer.carriers.nixl.driver import Driver
from kv_transfer.ends.idle_pool import IdlePool
from kv_transfer.ends.one_sided import Fences
from kv_transfer.ends.tasks import Interrupt
from tandem.errors import TransferFailed
from tandem.process import logs

log = logging.getLogger(__name__)

MAX_AGENTS = 64
# A writer whose transfer has failed says within this time that it writes no more, or its agent is closed.
PATIENCE_S = 2.5


@dataclass(eq=False)
class WriterAgent:
    """By it one process writes, and no other. Once it is closed nothing comes through it, whatever that process does:
    its sockets and queue pairs are gone, and what lay in their buffers with them.
    """

    writer_id: str
    agent: Agent
    closed: bool = False


class WriterAgents:
    """Methods with an underscore run in the driver's thread, or wait in tasks."""

    def __init__(self, devices: str) -> None:
        self._devices = devices
        self._driver = Driver("kv-nixl-receive", self._poll)
        # By writer; users are the interrupts of transfers that may come.
        self._agents: IdlePool[str, WriterAgent] = IdlePool(
            MAX_AGENTS, self._close, f"{MAX_AGENTS} senders write into this worker's pool already"
        )
        # By reservation: set when its writer has written its last.
        self._released: dict[str, asyncio.Event] = {}
        self._fences = Fences()

    @property
    def open_agents(self) -> list[WriterAgent]:
        return [kept.value for kept in self._agents.kept.values()]

    async def enter(self, user: Interrupt, writer_id: str, pool: Tensor) -> tuple[WriterAgent, bytes]:
        """The writer's agent, and the metadata to find it by, until `leave`; its closing interrupts the user.

        Raises TransferFailed, Overloaded.
        """
        return await self._driver.call(self._enter, user, writer_id, pool)

    def leave(self, user: Interrupt, writer_id: str) -> None:
        """Whether it has entered or not: an entering that was cancelled may be under way."""
        with suppress(TransferFailed):  # closed: there is no agent any more
            self._driver.submit(self._agents.leave, writer_id, user)

    def expect_release(self, reservation_id: str) -> None:
        """From now on its writer may write, until `forget`."""
        self._released[reservation_id] = asyncio.Event()

    def release(self, reservation_id: str) -> None:
        """Its writer writes no more. Nothing happens for one that is not known: whoever knows the id was told it."""
        if reservation_id in self._released:
            self._released[reservation_id].set()

    def forget(self, reservation_id: str) -> None:
        self._released.pop(reservation_id, None)

    def fence(self, blocks: ExitStack, agent: WriterAgent, reservation_id: str, request_id: str) -> None:
        """blocks: closed when nobody writes into them any more."""
        blocks.callback(self.forget, reservation_id)
        self._fences.keep(blocks, self._wait(agent, self._released[reservation_id], request_id))

    async def close(self, agent: WriterAgent) -> None:
        """Its transfers end now: a writer that has not connected yet would try until its deadline."""
        await self._driver.call(self._close, agent)

    async def aclose(self) -> None:
        """The worker ends, and its pool with it: nobody gets these blocks any more."""
        self._fences.close()
        await self._driver.aclose(self._close_all)

    async def _wait(self, agent: WriterAgent, released: asyncio.Event, request_id: str) -> None:
        """Until its writer has written its last, or nothing of it can come any more."""
        while not agent.closed:
            with suppress(TimeoutError):
                async with asyncio.timeout(PATIENCE_S):
                    await released.wait()
                return
            logs.of_request(__name__, request_id).warning(
                "its sender does not say that it writes no more: it is cut off"
            )
            await self.close(agent)

    def _enter(self, user: Interrupt, writer_id: str, pool: Tensor) -> tuple[WriterAgent, bytes]:
        entered = self._agents.enter(writer_id, user, lambda: WriterAgent(writer_id, Agent(self._devices)))
        entered.agent.register(pool)
        self._driver.wake()
        return entered, entered.agent.metadata()

    def _poll(self) -> bool:
        busy = [kept.value for kept in self._agents.kept.values() if kept.users]
        for each in busy:
            try:
                each.agent.progress()
            except TransferFailed:  # others go on through theirs
                self._close(each)
        return bool(busy)

    def _close(self, agent: WriterAgent) -> None:
        if agent.closed:
            return
        kept, users = self._agents.kept.get(agent.writer_id), set[object]()
        if kept is not None and kept.value is agent:  # its writer may have another by now
            users = self._agents.kept.pop(agent.writer_id).users
        try:
            agent.agent.close()
        except Exception:  # it may be open still, and whoever waits for its end goes on waiting
            log.exception("the agent of a writer by NIXL cannot be closed")
        else:
            agent.closed = True
        for user in users:
            assert isinstance(user, Interrupt)
            user.throw(TransferFailed("the receiver has closed the connection by NIXL that the KV was to come by"))

    def _close_all(self) -> None:
        for agent in self.open_agents:
            self._close(agent)
