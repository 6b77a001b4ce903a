"""The receiving end of `nixl`: the sender writes into the pool, and is fenced off from blocks that are others'.

    begun ──writer──▶ lent ──seal or abandon──▶ settled
                       └── any other end ──▶ fenced ──its writer has released them──▶ free
                                               └── no word for a while ──▶ its agent is closed ──▶ free

A process writes by an agent of its own (writer_agents.py). Until that is closed, or until the writer says that it wrote
its last, the transfer's blocks are in use (`IncomingTransfer.writing`): when the reservation ends meanwhile they are
quarantined, and go to nobody else.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import Any

from kv_transfer.base import IncomingTransfer
from kv_transfer.carriers.nixl.messages import Lent, WriterName
from kv_transfer.carriers.nixl.writer_agents import WriterAgent, WriterAgents
from kv_transfer.ends.one_sided import WrittenIntake, block_ids
from kv_transfer.ends.receiver import next_message, reply
from kv_transfer.ends.tasks import Interrupt
from kv_transfer.frames.messages import Open
from kv_transfer.frames.runs import crc32
from tandem.errors import TransferFailed


class NixlIntake(WrittenIntake):
    """The Intake of one transfer by NIXL."""

    def __init__(self, agents: WriterAgents, context: Any) -> None:
        self._agents = agents
        self._context = context
        self._request_id = self._reservation_id = self._writer_id = ""
        # By which it is known as a user of its writer's agent.
        self._interrupt: Interrupt | None = None
        # The writer's, once its blocks are lent.
        self._agent: WriterAgent | None = None
        # Holds the transfer's blocks from then on.
        self._blocks = ExitStack()

    async def _give_access(
        self, incoming: IncomingTransfer, opening: Open, frames: AsyncIterator[bytes], interrupt: Interrupt
    ) -> None:
        writer = await next_message(frames)
        if not isinstance(writer, WriterName):
            raise TransferFailed("the sender does not say who writes")
        self._interrupt, self._writer_id = interrupt, writer.writer_id
        agent, metadata = await self._agents.enter(interrupt, writer.writer_id, incoming.pool)
        self._request_id, self._reservation_id = incoming.request_id, opening.reservation_id
        self._blocks.enter_context(incoming.writing())
        self._agents.expect_release(self._reservation_id)
        self._agent = agent
        pool = incoming.pool
        blocks, ids = block_ids(incoming, opening.tokens)
        payload = metadata + ids
        lent = Lent(
            agent_id=agent.agent.id,
            address=pool.data_ptr(),
            memory=pool.device.type,
            device=max(0, pool.get_device()),
            pool_blocks=pool.shape[2],
            metadata_bytes=len(metadata),
            block_count=len(blocks),
            checksum=crc32(payload),
        )
        await reply(self._context, lent, payload)

    def settle(self) -> None:
        """See Intake. Whoever seals or abandons has written its last."""
        self._blocks.close()
        self._agents.forget(self._reservation_id)
        self._leave_agent()
        self._agent = None

    def leave(self) -> None:
        if self._agent is None:
            self._leave_agent()
            return
        # Its agent goes on moving what was written: the writer waits for that before it lets go of the blocks.
        self._blocks.callback(self._leave_agent)
        self._agents.fence(self._blocks.pop_all(), self._agent, self._reservation_id, self._request_id)

    def _leave_agent(self) -> None:
        if self._interrupt is not None:
            self._agents.leave(self._interrupt, self._writer_id)
