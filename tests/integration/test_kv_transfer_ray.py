"""What the transport through Ray's object store has alone: memory there, lost objects, forged places, processes."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from threading import Event

import pytest
from kv_peer import peer
from kv_rig import FINGERPRINT, Rig, config_with, grpc_rig, ray_rig, stands_still, until

from kv_transfer.carriers.grpc.carrier import GrpcCarrier
from kv_transfer.carriers.ray.carrier import PlacedData, RayCarrier
from kv_transfer.carriers.ray.plasma import Place, Plasma, connect
from kv_transfer.ends.carrier import Carrier
from kv_transfer.ends.transport import PushTransport
from kv_transfer.frames.messages import Data
from tandem.errors import Refused, TransferFailed, WorkerLost

LARGE = replace(FINGERPRINT, num_layers=16, num_kv_heads=8, head_dim=256)


@pytest.fixture
async def rig(ray_node: str) -> AsyncIterator[Rig]:
    async with ray_rig(FINGERPRINT, config_with()) as rig:
        yield rig
        await until(lambda: all(reservation.writers == 0 for reservation in rig.reservations.by_id.values()))


@pytest.fixture
def plasma(ray_node: str) -> Plasma:
    plasma = connect()
    assert plasma is not None
    return plasma


async def until_room(plasma: Plasma, enough: Callable[[int], bool]) -> None:
    """Ray counts what is put and what is freed a moment later."""
    async with asyncio.timeout(20):
        while not enough(await asyncio.to_thread(plasma.room)):
            await asyncio.sleep(0.02)


async def assert_empty(plasma: Plasma, room: int) -> None:
    """As much room as before."""
    await until_room(plasma, lambda left: left == room)


def spoil(monkeypatch: pytest.MonkeyPatch, change: Callable[[PlacedData], PlacedData]) -> list[PlacedData]:
    """Changes the places that are sent; gives those that were."""
    sent: list[PlacedData] = []
    honest = PlacedData.of

    def spoiled(data: Data, place: Place) -> PlacedData:
        sent.append(change(honest(data, place)))
        return sent[-1]

    monkeypatch.setattr("kv_transfer.carriers.ray.carrier.PlacedData.of", spoiled)
    return sent


async def test_nothing_stays_in_the_store(rig: Rig, plasma: Plasma) -> None:
    room = plasma.room()
    for index in range(12):
        job = rig.job(name=f"r{index}")
        await rig.transfer(job)
        job.assert_arrived()
    await assert_empty(plasma, room)


async def test_nothing_stays_in_the_store_after_a_cancel(rig: Rig, plasma: Plasma) -> None:
    room = plasma.room()
    task = asyncio.create_task(rig.transfer_in_halves(job := rig.job(), between=asyncio.Event().wait))
    await until(lambda: job.reservation.touches > 0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: job.reservation.ended)
    await assert_empty(plasma, room)


async def test_a_slow_receiver_bounds_what_is_in_the_store(ray_node: str, plasma: Plasma, by_threads: None) -> None:
    room = plasma.room()
    async with ray_rig(LARGE, config_with(object_bytes=65536, frames_in_flight=4)) as rig:
        job = rig.job(prompt_tokens=200)
        shut = Event()
        rig.service.threads.submit(shut.wait)  # type: ignore[union-attr]
        rig.service.threads.submit(shut.wait)  # type: ignore[union-attr]
        sending = asyncio.create_task(rig.transfer(job, chunk=200))
        await until(lambda: rig.transport.counters.frames == 4)
        await stands_still(lambda: rig.transport.counters.frames)
        assert rig.transport.counters.frames == 4
        # An object of Ray's has a few bytes of its own.
        assert 4 * 65536 <= room - await asyncio.to_thread(plasma.room) <= 4 * 65600
        shut.set()
        await sending
        job.assert_arrived()
    await assert_empty(plasma, room)


async def test_two_processes(rig: Rig, ray_node: str, plasma: Plasma) -> None:
    room = plasma.room()
    job = rig.job()
    async with peer("send", rig.address, "--whole", "--ray", ray_node) as (_, said):
        assert said == "whole"
        job.assert_arrived()
        assert rig.received.bytes == 21 * job.source.layout.token_bytes
        await assert_empty(plasma, room)


async def test_a_killed_sender_fails_the_transfer_and_leaves_no_object(rig: Rig, ray_node: str, plasma: Plasma) -> None:
    room = plasma.room()
    job = rig.job()
    async with peer("send", rig.address, "--ray", ray_node) as (process, said):
        assert said == "half"
        await until(lambda: job.reservation.touches > 0)
        assert not job.reservation.ended
        process.send_signal(signal.SIGKILL)
        assert await process.wait() == -signal.SIGKILL
        await until(lambda: job.reservation.ended, seconds=5)
    assert [type(error) for error in job.reservation.errors] == [TransferFailed]
    await assert_empty(plasma, room)
    await rig.assert_healthy()


async def test_a_killed_receiver_is_a_lost_worker_and_leaves_no_object(rig: Rig, ray_node: str, plasma: Plasma) -> None:
    room = plasma.room()
    job = rig.job()
    async with peer("receive", "--ray", ray_node) as (process, port):
        target = replace(job.target, address=f"127.0.0.1:{port}")

        async def kill() -> None:
            process.send_signal(signal.SIGKILL)
            assert await process.wait() == -signal.SIGKILL

        job.reservation.touches = 1  # the reservation that counts is in the other process
        with pytest.raises(WorkerLost):
            await rig.transfer_in_halves(replace(job, target=target), between=kill)
    await assert_empty(plasma, room)
    await rig.assert_healthy()


async def test_a_full_store_fails_the_transfer_and_nothing_else(ray_node: str, plasma: Plasma) -> None:
    room = plasma.room()
    async with ray_rig(LARGE, config_with(object_bytes=1 << 20)) as rig:
        job = rig.job(prompt_tokens=200)
        filler = [plasma.put(bytes(16 << 20)) for _ in range((room - (2 << 20)) // (16 << 20))]
        await until_room(plasma, lambda left: left < 18 << 20)
        rest = plasma.put(bytes(plasma.room() - (1 << 20)))
        await until_room(plasma, lambda left: left < 2 << 20)
        with pytest.raises(TransferFailed, match=r"has room for \d+ bytes, the transfer needs 4194304"):
            await rig.transfer(job)
        assert not job.reservation.ended
        del filler, rest
        await assert_empty(plasma, room)
        await rig.transfer(job)
        job.assert_arrived()


async def test_a_store_that_takes_nothing_fails_the_transfer(
    rig: Rig, plasma: Plasma, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An object larger than the whole store, and its disk: what Ray itself raises then."""
    room = plasma.room()
    job = rig.job()
    refused: list[int] = []
    put = Plasma.put

    def oversized(self: Plasma, payload: bytes) -> tuple[object, Place]:
        refused.append(len(payload))
        return put(self, bytes(room + (1 << 20)))

    monkeypatch.setattr(Plasma, "put", oversized)
    with pytest.raises(TransferFailed, match="took no payload of"):
        await rig.transfer(job)
    assert refused, "the fault took effect"
    monkeypatch.undo()
    await until(lambda: job.reservation.ended)
    await rig.assert_healthy()
    await assert_empty(plasma, room)


async def test_a_lost_object_fails_the_transfer(rig: Rig, ray_node: str, plasma: Plasma) -> None:
    room = plasma.room()
    job = rig.job()
    async with peer("send", rig.address, "--lose", "--ray", ray_node) as (_, said):
        assert said == "lost: TransferFailed: a payload in Ray's object store is lost"
    await until(lambda: job.reservation.ended)
    assert [type(error) for error in job.reservation.errors] == [TransferFailed]
    await rig.assert_healthy()
    await assert_empty(plasma, room)


FORGERIES: dict[str, Callable[[PlacedData], PlacedData]] = {
    "noise": lambda frame: replace(frame, owner=os.urandom(70)),
    "empty address": lambda frame: replace(frame, owner=b"\x00"),
    "cut address": lambda frame: replace(frame, owner=frame.owner[:-3]),
    "short object id": lambda frame: replace(frame, object_id=frame.object_id[:5]),
    "long object id": lambda frame: replace(frame, object_id=frame.object_id * 2),
}


@pytest.mark.parametrize("name", FORGERIES)
async def test_a_forged_place_fails_the_transfer_alone(rig: Rig, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Ray ends a process that looks up an object by a malformed address: it must never get one."""
    job = rig.job()
    sent = spoil(monkeypatch, FORGERIES[name])
    with pytest.raises(TransferFailed, match="is no object of Ray's"):
        await rig.transfer(job)
    assert sent, "the fault took effect"
    monkeypatch.undo()
    await until(lambda: job.reservation.ended)
    await rig.assert_healthy()


async def test_an_object_of_another_size_or_kind_is_refused(
    rig: Rig, plasma: Plasma, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    held, other = plasma.put(b"short")
    pickled = ray.put({"not": "raw"})
    places = {"bytes where": other, "is lost": replace(other, object_id=pickled.binary())}
    for index, (why, place) in enumerate(places.items()):
        job = rig.job(name=f"r{index}")
        spoil(monkeypatch, lambda frame, place=place: replace(frame, object_id=place.object_id))  # type: ignore[misc]
        with pytest.raises(TransferFailed, match=why):
            await rig.transfer(job)
        monkeypatch.undo()
        await until(lambda job=job: job.reservation.ended)  # type: ignore[misc]
    assert held is not None
    await rig.assert_healthy()


async def test_a_receiver_without_ray_refuses(ray_node: str, plasma: Plasma) -> None:
    async with grpc_rig(FINGERPRINT, config_with()) as rig:
        job = rig.job()
        transport = PushTransport(RayCarrier(config_with().worker, plasma))
        through_ray = Rig(FINGERPRINT, transport, rig.address, shared_pool=False)
        with pytest.raises(Refused):
            await through_ray.transfer(job)
        assert not job.reservation.ended
        await transport.aclose()
        await rig.assert_healthy()


async def test_each_method_takes_its_own_kind_of_frame(
    rig: Rig, plasma: Plasma, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A payload where its place belongs, and the other way round."""
    async with grpc_rig(FINGERPRINT, config_with()) as other:
        monkeypatch.setattr(GrpcCarrier, "method", RayCarrier.method)
        with pytest.raises(TransferFailed, match="a frame of kind data came"):
            await send_elsewhere(rig, GrpcCarrier(config_with().worker))
        monkeypatch.undo()
        monkeypatch.setattr(RayCarrier, "method", GrpcCarrier.method)
        with pytest.raises(TransferFailed, match="a frame of kind placed came"):
            await send_elsewhere(other, RayCarrier(config_with().worker, plasma))
        monkeypatch.undo()
        await other.assert_healthy()
    await rig.assert_healthy()


async def send_elsewhere(rig: Rig, carrier: Carrier) -> None:
    """By another carrier than the rig's."""
    sender = Rig(FINGERPRINT, PushTransport(carrier), rig.address, shared_pool=False)
    try:
        await sender.transfer(rig.job(name=carrier.name))
    finally:
        await sender.transport.aclose()


def test_a_process_outside_ray_has_no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(__import__("sys").modules, "ray", raising=False)
    assert connect() is None
