"""A receiver whose reservations get their blocks from a real pool, and senders that are stopped and woken."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import torch
from kv_peer import peer
from kv_reservations import FakeReservation
from kv_rig import FINGERPRINT, POOL_BLOCKS, RIGS, Job, Rig, config_with, until

from kv_transfer.base import TransferTarget
from tandem.engine.block_pool import BlockPool, BlockTable


class PooledReservation(FakeReservation):
    """Its blocks are of a real pool, and go back as a reservation's do."""

    def __init__(self, rig: Rig, table: BlockTable, target: TransferTarget) -> None:
        super().__init__(rig.receiving_pool, table.blocks, target)
        self.one_sided = True
        self.table = table

    @contextmanager
    def writing(self) -> Iterator[None]:
        with super().writing(), self.table.in_use():
            yield

    def break_lease(self) -> None:
        super().break_lease()
        self.table.release()

    def abandoned(self) -> None:
        super().abandoned()
        self.table.release()

    def failed(self, error: Exception) -> None:
        super().failed(error)  # type: ignore[arg-type]
        self.table.release()


class House:
    """A receiver whose reservations get their blocks from one pool."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.pool = BlockPool(POOL_BLOCKS, FINGERPRINT.block_size, prefix_cache=False)

    def job(self, name: str, prompt_tokens: int = 21) -> tuple[Job, PooledReservation]:
        job = self.rig.job(prompt_tokens, name=name)
        table = self.pool.acquire(self.pool.blocks_for(prompt_tokens))
        assert table is not None, "the pool is full"
        reservation = PooledReservation(self.rig, table, job.target)
        self.rig.reservations.by_id[job.target.reservation_id] = job.reservation = reservation
        return job, reservation

    def take_all(self) -> BlockTable:
        """A request that needs every block that may be had."""
        table = self.pool.acquire(self.pool.num_free)
        assert table is not None
        return table

    def state(self, table: BlockTable) -> torch.Tensor:
        return self.rig.receiving_pool[:, :, list(table.blocks)].clone()

    @property
    def at_rest(self) -> bool:
        report = self.pool.check_integrity()
        assert report.problem == ""
        return (report.free, report.referenced, report.quarantined) == (POOL_BLOCKS, 0, 0)


@asynccontextmanager
async def open_house(transport: str) -> AsyncIterator[House]:
    """Of RIGS; frames are large: a layer of a prompt is one. At rest when it is left."""
    async with RIGS[transport](FINGERPRINT, config_with(frame_bytes=1 << 20, object_bytes=1 << 20)) as rig:
        house = House(rig)
        yield house
        await until(lambda: house.at_rest)


@asynccontextmanager
async def waiting_sender(house: House, where: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process that sends by the house's transport, and waits where it says (see kv_peer.py)."""
    async with peer("send", house.rig.address, "--wait-in", where) as (process, said):
        assert said == "waiting"
        yield process


def stop(process: asyncio.subprocess.Process) -> None:
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)


def wake(process: asyncio.subprocess.Process) -> None:
    """To go on with what it waited in."""
    assert process.stdin is not None
    process.stdin.write(b"\n")
    process.send_signal(signal.SIGCONT)


async def said_next(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(20):
        return (await process.stdout.readline()).decode().strip()
