"""Law 5 where the sender writes into the receiver's pool itself: a writer that lost its lease never writes into blocks
that somebody else got. Senders are processes that are stopped, killed and woken."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from kv_house import House, open_house, said_next, stop, waiting_sender, wake
from kv_peer import peer
from kv_rig import FINGERPRINT, POOL_BLOCKS, Rig, config_with, until

import kv_transfer.carriers.shm.carrier
from kv_transfer.carriers.shm.carrier import ShmCarrier
from kv_transfer.carriers.shm.memory import PeerMemory, SharedMemory
from kv_transfer.ends.one_sided import WrittenIntake
from kv_transfer.ends.transport import PushTransport
from kv_transfer.frames.cells import Cells, Native
from kv_transfer.frames.messages import Data
from tandem.errors import TransferFailed


@pytest.fixture
async def house() -> AsyncIterator[House]:
    async with open_house("shm") as house:
        yield house


@pytest.fixture(params=["shm", "nixl"])
def transport(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name == "nixl":
        request.getfixturevalue("nixl")
    return name


@pytest.fixture
async def either_house(transport: str) -> AsyncIterator[House]:
    async with open_house(transport) as house:
        yield house


@asynccontextmanager
async def writing_sender(house: House) -> AsyncIterator[asyncio.subprocess.Process]:
    """It has written, and will write again when it is woken."""
    async with waiting_sender(house, "copy" if house.rig.transport.name == "shm" else "write") as process:
        yield process


async def test_a_killed_writer_frees_its_blocks(either_house: House) -> None:
    _, late = either_house.job("r1")
    async with writing_sender(either_house) as process:
        late.break_lease()
        assert either_house.pool.num_quarantined == len(late.blocks)
        process.send_signal(signal.SIGKILL)
        assert await process.wait() == -signal.SIGKILL
        await until(lambda: either_house.at_rest, seconds=2 if either_house.rig.transport.name == "shm" else 5)


async def test_the_service_closes_while_a_writer_is_waited_for(either_house: House) -> None:
    _, late = either_house.job("r1")
    async with writing_sender(either_house) as process:
        stop(process)
        await either_house.rig.stop()
        await until(lambda: late.ended)
        assert either_house.pool.num_quarantined == len(late.blocks)
        assert either_house.rig.service is not None
        await either_house.rig.service.aclose()
        await until(lambda: either_house.at_rest, seconds=2)


async def test_what_was_written_is_verified_where_it_lies(either_house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    store = WrittenIntake.store

    def spoil(self: WrittenIntake, cells: Cells, wire: Native, data: Data, payload: memoryview) -> None:
        if data.sequence == 0:
            cells.pool[data.layer_start, 1, cells.blocks[0], 3, 1, 5] += 1
        store(self, cells, wire, data, payload)

    monkeypatch.setattr(WrittenIntake, "store", spoil)
    job, reservation = either_house.job("r1")
    with pytest.raises(TransferFailed, match="payload of KV frame 0 fails its checksum"):
        await either_house.rig.transfer(job)
    assert reservation.first_token is None
    assert either_house.rig.received.corrupt_frames == 1


async def test_blocks_of_a_writer_that_was_stopped_wait_for_its_last_write(house: House) -> None:
    _, late = house.job("r1")
    async with waiting_sender(house, "copy") as process:
        stop(process)
        house.rig.receiving_pool[:, :, list(late.blocks)] = 0
        late.break_lease()
        assert house.pool.num_quarantined == len(late.blocks)

        # Others use every block that may be had, and one is served meanwhile.
        job, reservation = house.job("another")
        await house.rig.transfer(job)
        rest = house.take_all()
        assert not {*late.blocks} & {*reservation.blocks, *rest.blocks}
        house.rig.receiving_pool[:, :, list(rest.blocks)] = 7
        assert house.pool.acquire(1) is None
        assert house.pool.num_quarantined == len(late.blocks)

        wake(process)
        await until(lambda: house.pool.num_quarantined == 0)
        assert house.rig.receiving_pool[:, :, list(late.blocks)].any(), "the late write did happen"
        job.assert_arrived()
        assert (house.state(rest) == 7).all()
        assert "lease" in await said_next(process)
        for table in (reservation.table, rest):
            table.release()
        assert [type(error) for error in late.errors] == [TransferFailed]


async def test_a_sender_that_was_stopped_before_it_held_the_lock_holds_no_block(house: House) -> None:
    _, late = house.job("r1")
    async with waiting_sender(house, "lock") as process:
        stop(process)
        late.break_lease()
        assert house.pool.num_quarantined == 0
        everything = house.take_all()
        assert {*late.blocks} <= {*everything.blocks}
        house.rig.receiving_pool[:] = 7

        wake(process)
        assert "lease" in await said_next(process)
        await until(lambda: late.ended)
        assert (house.rig.receiving_pool == 7).all()
        everything.release()


async def test_a_sender_that_is_given_up_for_dead_is_waited_for(house: House) -> None:
    """Its call has ended; it still writes."""
    _, late = house.job("r1")
    async with waiting_sender(house, "copy") as process:
        stop(process)
        await house.rig.stop()
        await until(lambda: late.ended)
        assert house.pool.num_quarantined == len(late.blocks)
        assert house.pool.acquire(POOL_BLOCKS) is None
        wake(process)
        await until(lambda: house.at_rest)
        assert (await said_next(process)).startswith("failed: ")


async def test_a_seal_over_blocks_that_are_still_locked_is_refused(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, reservation = house.job("r1")
    held: list[kv_transfer.carriers.shm.carrier._ShmLink] = []
    rest = kv_transfer.carriers.shm.carrier._ShmLink.rest
    monkeypatch.setattr(kv_transfer.carriers.shm.carrier._ShmLink, "rest", lambda self: held.append(self))
    with pytest.raises(TransferFailed, match="may still write into"):
        await house.rig.transfer(job)
    assert reservation.first_token is None
    assert house.pool.num_quarantined == len(reservation.blocks)
    rest(held[0])


async def test_a_cancel_while_a_transfer_ends_waits_for_the_last_copy(
    house: House, monkeypatch: pytest.MonkeyPatch, by_threads: None
) -> None:
    """A failure is on its way out when the cancel comes: copies still go on, and the lock is still to be given up."""
    gates, begun = [threading.Event(), threading.Event()], []
    pack = kv_transfer.carriers.shm.carrier._ShmLink.pack

    def held(self: kv_transfer.carriers.shm.carrier._ShmLink, sequence: int, *frame: Any) -> tuple[Data, bytes]:
        begun.append(sequence)
        assert gates[sequence].wait(30)
        return pack(self, sequence, *frame)

    monkeypatch.setattr(kv_transfer.carriers.shm.carrier._ShmLink, "pack", held)
    job, reservation = house.job("r1")

    async def fail_in_mid_copy() -> None:
        async with house.rig.transport.open(job.source, job.target) as sender:
            for start in (0, 7, 14):
                await sender.send(house.rig.layers, range(start, start + 7))
            raise ZeroDivisionError

    sending = asyncio.create_task(fail_in_mid_copy())
    await until(lambda: len(begun) == 2)
    await until(lambda: reservation.ended)
    sending.cancel()
    gates[0].set()
    await asyncio.wait([sending], timeout=0.2)
    assert not sending.done()
    assert house.pool.num_quarantined == len(reservation.blocks)
    gates[1].set()
    with pytest.raises(asyncio.CancelledError):
        await sending
    assert sorted(begun) == [0, 1], "what no thread had begun is not made"
    await until(lambda: house.at_rest)


async def test_nothing_is_granted_without_the_lock(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PeerMemory, "lock", lambda self, key: None)
    job, reservation = house.job("r1")
    before = house.state(reservation.table)
    with pytest.raises(TransferFailed, match="does not hold the lock"):
        await house.rig.transfer(job)
    assert torch.equal(house.state(reservation.table), before)


async def test_memory_of_a_peer_that_is_gone_is_let_go() -> None:
    """A mapping would keep all of it."""
    transport = PushTransport(ShmCarrier(config_with().worker, SharedMemory()))
    gc.collect()  # of the tests before
    before = mapped_pools()
    async with peer("receive", "--shm") as (process, port):
        rig = Rig(FINGERPRINT, transport, f"127.0.0.1:{port}", shared_pool=False)
        await rig.transfer(rig.job())
        assert mapped_pools() == before + 1
        process.send_signal(signal.SIGKILL)
        assert await process.wait() == -signal.SIGKILL
        await until(lambda: mapped_pools() == before)
    await transport.aclose()


def mapped_pools() -> int:
    return Path("/proc/self/maps").read_text().count("/memfd:tandem-kv-")


def test_only_what_a_receiver_made_is_mapped() -> None:
    memory = SharedMemory()
    memory.allocate(8192)
    own = os.getpid()
    PeerMemory(own, memory.fd, memory.id, 8192).close()
    with pytest.raises(TransferFailed, match="not where it says"):
        PeerMemory(own, memory.fd, "another", 8192)
    with pytest.raises(TransferFailed, match="cannot be opened"):
        PeerMemory(own, 1 << 20, memory.id, 8192)
    with pytest.raises(TransferFailed, match="has 8192 bytes where its blocks take 4096"):
        PeerMemory(own, memory.fd, memory.id, 4096)
    unsealed = os.memfd_create("tandem-kv-x")
    os.ftruncate(unsealed, 8192)
    with pytest.raises(TransferFailed, match="no sealed memory"):
        PeerMemory(own, unsealed, "x", 8192)
    os.close(unsealed)


def test_memory_that_no_machine_has_is_refused() -> None:
    with pytest.raises(MemoryError):
        SharedMemory().allocate(1 << 60)
