"""The receiving end of `nixl`: the sender writes into the pool, and is fenced off from blocks that are others'.

    begun ──writer──▶ lent ──seal or abandon──▶ settled
                       └── any other end ──▶ fenced ──its writer has released them──▶ free
                                               └── no word for a while ──▶ its door is closed ──▶ free

A door is an agent that one writing process writes through, and no other. Once it is closed nothing comes through it,
whatever that process does: its sockets and queue pairs are gone, and what lay in their buffers with them. Until then,
or until their writer says that it wrote its last, the landing's blocks are in use (`Landing.writing`): when the
reservation ends meanwhile they are quarantined, and go to nobody else.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kv_transfer.base import Landing
from kv_transfer.checksum import crc32
from kv_transfer.fences import Fences
from kv_transfer.interrupt import Interrupt
from kv_transfer.messages import Lent, Open, Writer
from kv_transfer.nixl_agent import Agent
from kv_transfer.nixl_driver import Driver
from kv_transfer.receiver import next_message, tell
from kv_transfer.wire_dtype import Native
from kv_transfer.written import WrittenIntake, block_ids
from tandem.errors import Overloaded, Refused, TransferFailed
from tandem.process import logs

log = logging.getLogger(__name__)

MAX_DOORS = 64
# A writer whose transfer has failed says within this time that it writes no more, or its door is closed.
_PATIENCE_S = 2.5


@dataclass(eq=False)
class Door:
    agent: Agent
    # Of the transfers that may come through it.
    users: set[Interrupt] = field(default_factory=set)
    # Nothing comes through it any more.
    closed: bool = False


class Doors:
    """The receiving agents of a worker. Methods with an underscore run in the driver's thread, or wait in tasks."""

    def __init__(self, devices: str) -> None:
        self._devices = devices
        self._driver = Driver("kv-nixl-receive", self._look)
        # By writer; the one longest out of use first.
        self._doors: OrderedDict[str, Door] = OrderedDict()
        # By reservation: set when its writer has written its last.
        self._released: dict[str, asyncio.Event] = {}
        self._fences = Fences()

    async def open(self, user: Interrupt, writer_id: str, pool: Tensor) -> tuple[Door, bytes]:
        """The writer's door, and the metadata to find it by, until `leave`; the user is interrupted when it is shut.

        Raises TransferFailed, Overloaded.
        """
        return await self._driver.call(self._open, user, writer_id, pool)

    def leave(self, user: Interrupt) -> None:
        """Whether it has a door or not: an opening that was cancelled may be under way."""
        with suppress(TransferFailed):  # closed: there is no door any more
            self._driver.order(self._leave, user)

    def lend(self, reservation_id: str) -> asyncio.Event:
        """Set by `release`."""
        released = self._released[reservation_id] = asyncio.Event()
        return released

    def release(self, reservation_id: str) -> None:
        """Its writer writes no more. Nothing happens for one that is not known: whoever knows the id was told it."""
        released = self._released.get(reservation_id)
        if released is not None:
            released.set()

    def settled(self, reservation_id: str) -> None:
        self._released.pop(reservation_id, None)

    def fence(self, blocks: ExitStack, door: Door, reservation_id: str, request_id: str) -> None:
        """blocks: closed when nobody writes into them any more."""
        blocks.callback(self.settled, reservation_id)
        self._fences.keep(blocks, self._wait(door, self._released[reservation_id], request_id))

    async def aclose(self) -> None:
        """The worker ends, and its pool with it: nobody gets these blocks any more."""
        self._fences.close()
        await self._driver.aclose(self._close)

    async def _wait(self, door: Door, released: asyncio.Event, request_id: str) -> None:
        """Until it has written its last, or nothing of it can come any more."""
        while not door.closed:
            with suppress(TimeoutError):
                async with asyncio.timeout(_PATIENCE_S):
                    await released.wait()
                return
            logs.of_request(__name__, request_id).warning(
                "its sender does not say that it writes no more: it is shut out"
            )
            await self._driver.call(self._shut, door)

    def _open(self, user: Interrupt, writer_id: str, pool: Tensor) -> tuple[Door, bytes]:
        door = self._doors.get(writer_id)
        if door is None:
            self._make_room()
            door = self._doors[writer_id] = Door(Agent(self._devices))
        door.agent.register(pool)
        door.users.add(user)
        self._doors.move_to_end(writer_id)
        self._driver.wake()
        return door, door.agent.metadata()

    def _make_room(self) -> None:
        if len(self._doors) < MAX_DOORS:
            return
        idle = next((door for door in self._doors.values() if not door.users), None)
        if idle is None:
            raise Overloaded(f"{MAX_DOORS} senders write into this worker's pool already")
        self._shut(idle)

    def _leave(self, user: Interrupt) -> None:
        for door in self._doors.values():
            door.users.discard(user)

    def _look(self) -> bool:
        busy = [door for door in self._doors.values() if door.users]
        for door in busy:
            try:
                door.agent.progress()
            except TransferFailed:  # others go on through theirs
                self._shut(door)
        return bool(busy)

    def _shut(self, door: Door) -> None:
        """Its transfers end now: a writer that has not connected yet would try until its deadline."""
        if door.closed:
            return
        self._doors = OrderedDict((writer, each) for writer, each in self._doors.items() if each is not door)
        try:
            door.agent.close()
        except Exception:  # it may be open still, and whoever waits for its end goes on waiting
            log.exception("a writer by NIXL cannot be shut out")
        else:
            door.closed = True
        for user in door.users:
            user.throw(TransferFailed("the receiver has closed the connection by NIXL that the KV was to come by"))

    def _close(self) -> None:
        for door in list(self._doors.values()):
            self._shut(door)


class NixlIntake(WrittenIntake):
    """The Intake of one transfer by NIXL."""

    def __init__(self, doors: Doors, context: Any) -> None:
        self._doors = doors
        self._context = context
        self._request_id = self._reservation_id = ""
        # By which it is known at its door.
        self._interrupt: Interrupt | None = None
        # Of the writer, once its blocks are lent.
        self._door: Door | None = None
        # Holds the landing's blocks from then on.
        self._blocks = ExitStack()

    async def begin(self, landing: Landing, opening: Open, frames: AsyncIterator[bytes], interrupt: Interrupt) -> None:
        """See Intake. A transfer of nothing asks for nothing."""
        if opening.wire_dtype != Native.name:
            raise Refused(f"what is written into the pool is native KV, not {opening.wire_dtype[:20]}")
        if not opening.tokens:
            return
        writer = await next_message(frames)
        if not isinstance(writer, Writer):
            raise TransferFailed("the sender does not say who writes")
        self._interrupt = interrupt
        door, metadata = await self._doors.open(interrupt, writer.writer_id, landing.pool)
        self._request_id, self._reservation_id = landing.request_id, opening.reservation_id
        self._blocks.enter_context(landing.writing())
        self._doors.lend(self._reservation_id)
        self._door = door
        await tell(self._context, *_lent(door.agent.id, metadata, landing, opening.tokens))

    def settle(self) -> None:
        """See Intake. Whoever seals or abandons has written its last."""
        self._blocks.close()
        self._doors.settled(self._reservation_id)
        self._leave_door()
        self._door = None

    def leave(self) -> None:
        """See Intake."""
        if self._door is None:
            self._leave_door()
            return
        # Its door goes on moving what was written: the writer waits for that before it lets go of the blocks.
        self._blocks.callback(self._leave_door)
        self._doors.fence(self._blocks.pop_all(), self._door, self._reservation_id, self._request_id)

    def _leave_door(self) -> None:
        if self._interrupt is not None:
            self._doors.leave(self._interrupt)


def _lent(agent_id: str, metadata: bytes, landing: Landing, tokens: range) -> tuple[Lent, bytes]:
    """And the payload."""
    pool = landing.pool
    blocks, ids = block_ids(landing, tokens)
    payload = metadata + ids
    lent = Lent(
        agent_id=agent_id,
        address=pool.data_ptr(),
        memory=pool.device.type,
        device=max(0, pool.get_device()),
        pool_blocks=pool.shape[2],
        metadata_bytes=len(metadata),
        block_count=len(blocks),
        checksum=crc32(payload),
    )
    return lent, payload
