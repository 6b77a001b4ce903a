"""Law 5 where the sender writes by NIXL, and what else is nixl's alone. Senders are processes that are stopped, killed
and woken; receivers too."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from kv_house import House, open_house, said_next, stop, waiting_sender, wake
from kv_peer import peer
from kv_rig import FINGERPRINT, POOL_BLOCKS, Job, Rig, config_with, until

import kv_transfer.carriers.nixl.carrier
import kv_transfer.carriers.nixl.writer_agents
from kv_transfer.carriers.nixl.agent import Agent, Pieces, Write
from kv_transfer.carriers.nixl.carrier import NixlCarrier
from kv_transfer.carriers.nixl.messages import Lent, WriterName
from kv_transfer.carriers.nixl.writer import NixlWriter
from kv_transfer.carriers.nixl.writer_agents import WriterAgents
from kv_transfer.ends.link import SERVICE
from kv_transfer.ends.sender import opening_of
from kv_transfer.ends.transport import PushTransport
from kv_transfer.frames.codec import decode, encode
from tandem.errors import DeadlineExceeded, TransferFailed, WorkerLost
from tandem.rpc import make_channel

pytestmark = pytest.mark.usefixtures("nixl")


@pytest.fixture
async def house(nixl: None) -> AsyncIterator[House]:
    async with open_house("nixl") as house:
        yield house


def agents(rig: Rig) -> WriterAgents:
    assert isinstance(rig.receiver, NixlCarrier)
    return rig.receiver.agents


def open_agents(rig: Rig) -> int:
    return len(agents(rig).open_agents)


async def test_a_writer_that_was_stopped_is_shut_out_of_its_blocks(house: House) -> None:
    _, late = house.job("r1")
    async with waiting_sender(house, "write") as process:
        stop(process)
        assert house.rig.receiving_pool[:, :, list(late.blocks)].any(), "it wrote"
        job, reservation = house.job("another")
        await house.rig.transfer(job)
        assert open_agents(house.rig) == 2
        late.break_lease()
        await until(lambda: late.ended)
        assert house.pool.num_quarantined == len(late.blocks)

        # When its agent is closed, others get the blocks.
        await until(lambda: house.pool.num_quarantined == 0)
        assert open_agents(house.rig) == 1
        rest = house.take_all()
        assert {*late.blocks} <= {*rest.blocks}
        house.rig.receiving_pool[:, :, list(rest.blocks)] = 7

        wake(process)
        assert (await said_next(process)).startswith("failed: ")
        assert (house.state(rest) == 7).all(), "the late write landed nowhere"
        job.assert_arrived()
        for table in (reservation.table, rest):
            table.release()
        assert [type(error) for error in late.errors] == [TransferFailed]


async def test_a_writer_that_leaves_says_so_and_keeps_its_agent(house: House) -> None:
    job, reservation = house.job("r1")
    task = asyncio.create_task(house.rig.transfer_in_halves(job, between=asyncio.Event().wait))
    await until(lambda: reservation.touches > 0)
    started = time.monotonic()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: house.at_rest)
    assert time.monotonic() - started < kv_transfer.carriers.nixl.writer_agents.PATIENCE_S
    assert open_agents(house.rig) == 1


@pytest.mark.parametrize("lent", [False, True])
async def test_a_sender_that_stops_before_it_writes_ends_with_the_lease(house: House, lent: bool) -> None:
    job, reservation = house.job("r1")
    async with make_channel(house.rig.address) as channel, asyncio.timeout(10):
        call: Any = channel.stream_stream(f"/{SERVICE}/{NixlCarrier.method}")()
        await call.write(encode(opening_of(job.target)))
        if lent:
            await call.write(encode(WriterName("w")))
            message, _ = decode(await call.read())
            assert isinstance(message, Lent)
        await until(lambda: reservation.watched)
        reservation.break_lease()
        assert await call.code() is grpc.StatusCode.DATA_LOSS
        assert "lease" in await call.details()
    await until(lambda: house.at_rest)
    assert open_agents(house.rig) == 0


async def test_an_agent_that_nixl_fails_at_is_closed_and_the_next_one_works(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nixl_cu12._api import nixl_agent

    look, armed, failed = nixl_agent.get_new_notifs, threading.Event(), threading.Event()

    def fail_once(self: Any) -> Any:
        if armed.is_set() and not failed.is_set():
            failed.set()
            raise RuntimeError("of NIXL's own")
        return look(self)

    async def fail() -> None:
        armed.set()
        await until(failed.is_set)

    monkeypatch.setattr(nixl_agent, "get_new_notifs", fail_once)
    job, reservation = house.job("r1")
    with pytest.raises(TransferFailed):
        await house.rig.transfer_in_halves(replace(job, target=replace(job.target, deadline_s=10)), between=fail)
    assert reservation.first_token is None
    await until(lambda: house.at_rest)
    job, reservation = house.job("another")
    await house.rig.transfer(job)
    job.assert_arrived()
    reservation.table.release()


async def test_an_agent_that_is_closed_before_its_writer_comes_ends_the_transfer(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the agent's address, and would try until the deadline."""
    connect = NixlWriter.connect

    async def connect_and_close(self: NixlWriter, *rest: Any) -> None:
        await connect(self, *rest)
        (agent,) = agents(house.rig).open_agents
        await agents(house.rig).close(agent)
        assert agent.closed

    monkeypatch.setattr(NixlWriter, "connect", connect_and_close)
    job, reservation = house.job("r1")
    started = time.monotonic()
    with pytest.raises(TransferFailed, match="the receiver has closed the connection by NIXL"):
        await house.rig.transfer(replace(job, target=replace(job.target, deadline_s=20)))
    assert time.monotonic() - started < 5
    await until(lambda: house.at_rest, seconds=2)
    monkeypatch.undo()
    job, reservation = house.job("another")
    await house.rig.transfer(job)
    job.assert_arrived()
    reservation.table.release()


async def test_blocks_of_an_agent_that_does_not_close_stay_in_quarantine(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it does close, or its writer says that it writes no more."""
    close, refused = Agent.close, list[Agent]()
    closes = threading.Event()

    def close_later(self: Agent) -> None:
        if not closes.is_set():
            refused.append(self)
            raise OSError("of NIXL's own")
        close(self)

    monkeypatch.setattr(Agent, "close", close_later)
    monkeypatch.setattr(kv_transfer.carriers.nixl.writer_agents, "PATIENCE_S", 0.1)
    _, late = house.job("r1")
    async with waiting_sender(house, "write") as process:
        stop(process)
        late.break_lease()
        await until(lambda: len(refused) > 1)
        assert late.ended
        assert house.pool.num_quarantined == len(late.blocks)
        closes.set()
        await until(lambda: house.at_rest)
        wake(process)
        assert (await said_next(process)).startswith("failed: ")


async def test_nothing_is_written_outside_of_what_was_registered(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """NIXL's own check, behind ours."""
    pieces_of = kv_transfer.carriers.nixl.carrier.pieces_of
    end = house.rig.receiving_pool.data_ptr() + house.rig.receiving_pool.nbytes

    def beyond(address: int, *rest: Any) -> Pieces:
        pieces = pieces_of(address, *rest)
        if address == house.rig.receiving_pool.data_ptr():
            pieces[-1, 0] = np.uint64(end - 1)
        return pieces

    monkeypatch.setattr(kv_transfer.carriers.nixl.carrier, "pieces_of", beyond)
    before = house.rig.receiving_pool.clone()
    job, _ = house.job("r1")
    with pytest.raises(TransferFailed, match="cannot write there"):
        await house.rig.transfer(job)
    assert torch.equal(house.rig.receiving_pool, before)


async def test_blocks_are_not_given_back_under_the_last_write_of_an_abandoned_transfer(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_ended, asked, ends = Write.ended, threading.Event(), threading.Event()

    def ended(self: Write) -> bool:
        asked.set()
        return ends.is_set() and has_ended(self)

    monkeypatch.setattr(Write, "ended", ended)
    job, reservation = house.job("r1")
    async with house.rig.transport.open(job.source, job.target) as sender:
        sending = asyncio.create_task(sender.send(house.rig.layers, range(21)))
        await until(asked.is_set)
        abandoning = asyncio.create_task(sender.abandon())
        await asyncio.wait([abandoning], timeout=0.2)
        assert not reservation.given_up
        assert house.pool.acquire(POOL_BLOCKS) is None
        ends.set()
        await asyncio.gather(sending, abandoning)
        assert reservation.given_up


async def send_in_halves(rig: Rig, job: Job, between: Callable[[], Awaitable[None]]) -> None:
    async with rig.transport.open(job.source, job.target) as sender:
        await sender.send(rig.layers, range(10))
        await between()
        await sender.send(rig.layers, range(10, 21))
        await sender.seal(7)


async def test_a_receiver_that_dies_is_lost() -> None:
    carrier = NixlCarrier(config_with(nixl_devices="lo").worker, "cpu")
    transport = PushTransport(carrier)
    async with peer("receive", "--nixl") as (process, port):
        rig = Rig(FINGERPRINT, transport, f"127.0.0.1:{port}", shared_pool=False)
        job = rig.job()

        async def kill() -> None:
            process.send_signal(signal.SIGKILL)
            assert await process.wait() == -signal.SIGKILL

        with pytest.raises(WorkerLost):
            await send_in_halves(rig, job, kill)
    await transport.aclose()


async def test_a_receiver_that_stops_holds_a_transfer_until_its_deadline() -> None:
    """No thread of the sender waits for it, and no write is under way when the transfer is over."""
    carrier = NixlCarrier(config_with(nixl_devices="lo").worker, "cpu")
    transport = PushTransport(carrier)
    async with peer("receive", "--nixl") as (process, port):
        rig = Rig(FINGERPRINT, transport, f"127.0.0.1:{port}", shared_pool=False)
        job = rig.job()

        async def fall_silent() -> None:
            stop(process)

        with pytest.raises(DeadlineExceeded):
            await send_in_halves(rig, replace(job, target=replace(job.target, deadline_s=1.0)), fall_silent)
        assert carrier.writer.under_way == 0
        process.send_signal(signal.SIGCONT)
    await transport.aclose()
