"""Faults of threads, processes and links under the gRPC transport; after each the service still works."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from kv_peer import peer
from kv_rig import FINGERPRINT, Job, Rig, config_with, grpc_rig, stands_still, until

import kv_transfer.ends.link
from kv_transfer.frames.cells import Cells
from kv_transfer.frames.codec import frame_of
from kv_transfer.frames.messages import Data
from tandem.errors import DeadlineExceeded, TransferFailed, WorkerLost


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with grpc_rig(FINGERPRINT, config_with()) as rig:
        yield rig
        await until(lambda: all(reservation.writers == 0 for reservation in rig.reservations.by_id.values()))


class Gate:
    """Holds every scatter into one reservation's blocks until it is opened."""

    def __init__(self, job: Job) -> None:
        self.held = 0
        self._blocks = job.reservation.blocks
        self._open = threading.Event()

    def hold(self, cells: Cells) -> None:
        if cells.blocks is self._blocks:
            self.held += 1
            assert self._open.wait(30)

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def shut(monkeypatch: pytest.MonkeyPatch, by_threads: None) -> Iterator[Callable[[Job], Gate]]:
    gates: list[Gate] = []
    scatter = Cells.scatter

    def shut(job: Job) -> Gate:
        gate = Gate(job)
        gates.append(gate)

        def held(cells: Cells, payload: memoryview) -> int:
            gate.hold(cells)
            return scatter(cells, payload)

        monkeypatch.setattr(Cells, "scatter", held)
        return gate

    yield shut
    for gate in gates:
        gate.open()


async def test_a_cancelled_transfer_gives_no_block_back_under_a_writing_thread(shut: Callable[[Job], Gate]) -> None:
    async with grpc_rig(FINGERPRINT, config_with(frames_in_flight=1)) as rig:
        job = rig.job()
        gate = shut(job)
        sending = asyncio.create_task(rig.transfer(job))
        await until(lambda: gate.held == 1)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        # Over the same connection, so the server has seen the cancel by the time that this is done.
        await rig.assert_healthy()
        assert job.reservation.writers == 1
        assert not job.reservation.ended
        gate.open()
        await until(lambda: job.reservation.ended)
        assert len(job.reservation.errors) == 1


async def test_a_frame_that_cannot_be_made_fails_its_transfer_alone(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the event loop, with one under way before it."""

    def failing(sequence: int, *rest: Any) -> tuple[Data, bytes]:
        if sequence == 2:
            raise ZeroDivisionError
        return frame_of(sequence, *rest)

    monkeypatch.setattr(kv_transfer.ends.link, "frame_of", failing)
    job = rig.job()
    with pytest.raises(ZeroDivisionError):
        await rig.transfer(job)
    await until(lambda: job.reservation.ended)
    assert job.reservation.first_token is None
    monkeypatch.undo()
    await rig.assert_healthy()


async def test_a_frame_that_cannot_be_written_fails_its_transfer_alone(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Cells] = []
    scatter = Cells.scatter

    def failing(cells: Cells, payload: memoryview) -> int:
        written.append(cells)
        if len(written) == 3:
            raise MemoryError
        return scatter(cells, payload)

    monkeypatch.setattr(Cells, "scatter", failing)
    job = rig.job()
    with pytest.raises(TransferFailed):
        await rig.transfer(job)
    await until(lambda: job.reservation.ended and not job.reservation.writers)
    assert len(written) >= 3
    assert job.reservation.first_token is None
    monkeypatch.undo()
    await rig.assert_healthy()


async def test_a_slow_receiver_bounds_what_is_in_memory(
    monkeypatch: pytest.MonkeyPatch, shut: Callable[[Job], Gate]
) -> None:
    """One frame a token and layer, 16 KiB each: HTTP/2 windows hold some, the pipelines a few, and no more is made."""
    fingerprint = replace(FINGERPRINT, num_layers=16, num_kv_heads=8, head_dim=256)
    made: list[int] = []

    def counting(sequence: int, *rest: Any) -> tuple[Data, bytes]:
        made.append(sequence)
        return frame_of(sequence, *rest)

    monkeypatch.setattr(kv_transfer.ends.link, "frame_of", counting)
    async with grpc_rig(fingerprint, config_with(frame_bytes=16384, frames_in_flight=4)) as rig:
        job = rig.job(prompt_tokens=200)
        gate = shut(job)
        sending = asyncio.create_task(rig.transfer(job, chunk=200))
        await until(lambda: job.reservation.writers == 4)
        await stands_still(lambda: len(made))
        total = 200 * 16
        assert job.reservation.writers == 4
        assert rig.transport.counters.frames >= len(made) - 2, "gathered and not yet written"
        assert len(made) * 16384 < 12 << 20, "held by both processes and HTTP/2 together"
        assert len(made) < total / 4
        gate.open()
        await sending
        assert len(made) == total
        job.assert_arrived()


async def test_an_abandoned_send_stops_at_its_next_frame(shut: Callable[[Job], Gate]) -> None:
    fingerprint = replace(FINGERPRINT, num_layers=16, num_kv_heads=8, head_dim=256)
    async with grpc_rig(fingerprint, config_with(frame_bytes=16384)) as rig:
        job = rig.job(prompt_tokens=200)
        gate = shut(job)
        async with rig.transport.open(job.source, job.target) as sender:
            sending = asyncio.create_task(sender.send(rig.layers, range(200)))
            await until(lambda: gate.held > 0)
            abandoning = asyncio.create_task(sender.abandon())
            gate.open()
            await asyncio.gather(sending, abandoning)
        assert job.reservation.given_up
        assert rig.transport.counters.frames < 200 * 16
        assert rig.transport.counters.failures == rig.received.failures == 0


async def test_a_killed_receiver_is_a_lost_worker(rig: Rig) -> None:
    job = rig.job()
    async with peer("receive") as (process, port):
        target = replace(job.target, address=f"127.0.0.1:{port}")

        async def kill() -> None:
            process.send_signal(signal.SIGKILL)
            assert await process.wait() == -signal.SIGKILL

        job.reservation.touches = 1  # the reservation that counts is in the other process
        with pytest.raises(WorkerLost):
            await rig.transfer_in_halves(replace(job, target=target), between=kill)
    with pytest.raises(WorkerLost):
        await rig.transfer(replace(job, target=target))
    await rig.assert_healthy()


async def test_a_killed_sender_fails_the_reservation(rig: Rig) -> None:
    job = rig.job()
    async with peer("send", rig.address) as (process, said):
        assert said == "half"
        await until(lambda: job.reservation.touches > 0)
        assert not job.reservation.ended
        process.send_signal(signal.SIGKILL)
        assert await process.wait() == -signal.SIGKILL
        await until(lambda: job.reservation.ended, seconds=5)
    assert [type(error) for error in job.reservation.errors] == [TransferFailed]
    await rig.assert_healthy()


async def test_the_deadline_ends_the_receiver_of_a_frozen_sender(rig: Rig) -> None:
    job = rig.job()
    async with peer("send", rig.address, "--deadline", "2.0") as (process, said):
        assert said == "half"
        process.send_signal(signal.SIGSTOP)
        await until(lambda: job.reservation.touches > 0)
        assert not job.reservation.ended
        await until(lambda: job.reservation.ended, seconds=10)
    assert [type(error) for error in job.reservation.errors] == [DeadlineExceeded]
    await rig.assert_healthy()


async def test_closing_the_transport_fails_its_transfers(rig: Rig) -> None:
    job = rig.job()
    with pytest.raises(TransferFailed, match="closed in mid-transfer"):
        await rig.transfer_in_halves(job, between=rig.transport.aclose)
    await until(lambda: job.reservation.ended)


async def test_closing_the_transport_is_no_cancel_of_the_sender(rig: Rig, shut: Callable[[Job], Gate]) -> None:
    job = rig.job()
    gate = shut(job)
    sending = asyncio.create_task(rig.transfer(job))
    everything = 21 * job.source.layout.token_bytes
    await until(lambda: gate.held > 0 and rig.transport.counters.bytes == everything)  # it waits for the answer
    await rig.transport.aclose()
    with pytest.raises(TransferFailed, match="closed in mid-transfer"):
        await sending
    gate.open()
    await until(lambda: job.reservation.ended)


async def test_closing_waits_for_copies_and_the_event_loop_goes_on(rig: Rig) -> None:
    """Law 6. Each copy here takes until it is told to end."""
    assert rig.service is not None
    ends = threading.Event()
    closing: list[asyncio.Task[None]] = []
    late = threading.Timer(20, ends.set)  # or a loop that stands still would do so for ever
    late.start()
    for each in (rig.transport, rig.service):
        each.threads.submit(ends.wait)  # type: ignore[union-attr]
        closing.append(asyncio.create_task(each.aclose()))
    done, _ = await asyncio.wait(closing, timeout=0.2)
    assert not done
    assert not ends.is_set()
    ends.set()
    await asyncio.gather(*closing)
    late.cancel()


async def test_stopping_the_server_fails_the_reservation_and_loses_the_worker() -> None:
    async with grpc_rig(FINGERPRINT, config_with()) as rig:
        job = rig.job()
        with pytest.raises(WorkerLost):
            await rig.transfer_in_halves(job, between=rig.stop)
        await until(lambda: job.reservation.ended)
        assert len(job.reservation.errors) == 1
