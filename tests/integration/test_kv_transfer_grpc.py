"""Faults of frames, ports, processes and threads under the gRPC transport; after each the service still works."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import grpc
import pytest
from kv_peer import peer
from kv_rig import FINGERPRINT, Job, Rig, config_with, grpc_rig, until

import kv_transfer.receiver
import kv_transfer.sender
from kv_transfer.codec import MAX_FRAME_BYTES, Data, Done, Seal, decode, encode, encode_data
from kv_transfer.grpc_transport import MAX_MESSAGE_BYTES
from kv_transfer.pool_io import gather, scatter
from kv_transfer.sender import opening_of
from tandem.errors import DeadlineExceeded, Refused, TransferFailed, WorkerLost
from tandem.rpc import error_from_rpc, make_channel


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with grpc_rig(FINGERPRINT, config_with()) as rig:
        yield rig
        await until(lambda: all(landing.writers == 0 for landing in rig.landings.by_id.values()))


async def push(rig: Rig, frames: list[bytes]) -> Done:
    """Frames as they are, from a sender with no manners."""
    async with make_channel(rig.address, 2 * MAX_MESSAGE_BYTES) as channel:
        call: Any = channel.stream_unary("/tandem.v1.KVTransfer/Push")(iter(frames), timeout=20)
        done, _ = decode(await call)
        assert isinstance(done, Done)
        return done


async def status_of_push(rig: Rig, frames: list[bytes]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await push(rig, frames)
    return caught.value


def data_frame(job: Job, sequence: int, layers: range, tokens: range) -> tuple[Data, bytes]:
    payload = gather(job.source.pool, job.source.blocks, layers, tokens)
    return encode_data(sequence, layers, tokens, [memoryview(payload)])


def good_frames(job: Job) -> list[bytes]:
    data = [data_frame(job, layer, range(layer, layer + 1), range(21)) for layer in range(3)]
    checksum = 0
    for header, _ in data:
        checksum = kv_transfer.receiver.chain_checksum(checksum, header)
    seal = Seal(first_token=9, frames=3, bytes=sum(header.payload_bytes for header, _ in data), checksum=checksum)
    return [encode(opening_of(job.target)), *(frame for _, frame in data), encode(seal)]


def flip(frame: bytes, at: int) -> bytes:
    return frame[:at] + bytes([frame[at] ^ 1]) + frame[at + 1 :] if at >= 0 else flip(frame, len(frame) + at)


def with_frame(index: int, change: Callable[[bytes], bytes]) -> Callable[[list[bytes]], list[bytes]]:
    return lambda frames: [change(frame) if index == at else frame for at, frame in enumerate(frames)]


SPOILERS: dict[str, tuple[Callable[[list[bytes]], list[bytes]], str]] = {
    "corrupt payload": (with_frame(2, lambda frame: flip(frame, -1)), "payload of KV frame 1 fails its checksum"),
    "corrupt header": (with_frame(2, lambda frame: flip(frame, 20)), "header fails its checksum"),
    "truncated": (with_frame(1, lambda frame: frame[:-5]), "carries"),
    "garbage": (with_frame(1, lambda frame: os.urandom(500)), "not a KV frame"),
    "empty frame": (with_frame(1, lambda frame: b""), "a KV frame of 0 bytes"),
    "repeated": (lambda frames: [*frames[:3], *frames[2:]], "KV frame 1 came where 2 is next"),
    "left out": (lambda frames: [*frames[:2], *frames[3:]], "KV frame 2 came where 1 is next"),
    "second open": (lambda frames: [*frames[:2], *frames[:1], *frames[2:]], "other than data and seal"),
    "early seal": (lambda frames: [*frames[:3], frames[-1]], "missing at the seal"),
    "no seal": (lambda frames: frames[:-1], "left before the seal"),
    "data after the seal": (lambda frames: [*frames, frames[1]], "after the seal"),
    "second seal": (lambda frames: [*frames, frames[-1]], "after the seal"),
    "wrong totals": (
        with_frame(4, lambda frame: encode(replace(decode(frame)[0], checksum=1))),  # type: ignore[type-var]
        "the seal counts",
    ),
}


async def test_good_frames_are_good(rig: Rig) -> None:
    """Or the spoiled ones below would prove nothing."""
    job = rig.job()
    done = await push(rig, good_frames(job))
    assert (done.frames, done.bytes) == (3, 21 * job.source.layout.token_bytes)
    job.assert_arrived()


@pytest.mark.parametrize("name", SPOILERS)
async def test_spoiled_frames_fail_the_transfer_alone(rig: Rig, name: str) -> None:
    job = rig.job()
    spoil, why = SPOILERS[name]
    failure = await status_of_push(rig, spoil(good_frames(job)))
    assert failure.code() is grpc.StatusCode.DATA_LOSS
    assert why in str(failure.details())
    assert isinstance(error_from_rpc(failure), TransferFailed)
    assert [type(error) for error in job.landing.errors] == [TransferFailed]
    assert rig.received.failures == 1
    await rig.assert_healthy()


@pytest.mark.parametrize(
    "frames",
    [[], [b"\x00" * 12], [os.urandom(5000)], [b"TKVF" + os.urandom(5000)], [encode(Seal(1, 0, 0, 0))]],
    ids=["nothing", "zeros", "noise", "noise with magic", "seal first"],
)
async def test_garbage_instead_of_an_opening_touches_no_landing(rig: Rig, frames: list[bytes]) -> None:
    job = rig.job()
    failure = await status_of_push(rig, frames)
    assert failure.code() is grpc.StatusCode.DATA_LOSS
    assert not job.landing.ended
    await rig.assert_healthy()


async def test_a_frame_of_the_wrong_size_for_its_cells_is_refused(rig: Rig) -> None:
    job = rig.job()
    payload = gather(job.source.pool, job.source.blocks, range(1), range(20))
    _, frame = encode_data(0, range(1), range(21), [memoryview(payload)])
    failure = await status_of_push(rig, [good_frames(job)[0], frame])
    assert "its cells take" in str(failure.details())
    assert len(job.landing.errors) == 1


async def test_a_message_over_the_cap_is_refused_by_grpc(rig: Rig) -> None:
    job = rig.job()
    failure = await status_of_push(rig, [good_frames(job)[0], bytes(MAX_FRAME_BYTES + 1)])
    assert failure.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await until(lambda: job.landing.ended)
    await rig.assert_healthy()


async def test_noise_on_the_socket_disturbs_nobody(rig: Rig) -> None:
    job = rig.job()

    async def noise() -> None:
        host, port = rig.address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(os.urandom(100_000))
        async with asyncio.timeout(20):
            while await reader.read(1000):  # the server hangs up on it
                pass
        writer.close()

    async def ignoring_reset() -> None:
        with suppress(ConnectionError):
            await noise()

    await rig.transfer_in_halves(job, between=ignoring_reset)
    job.assert_arrived()
    await rig.assert_healthy()


async def test_another_block_size_is_refused_by_name(rig: Rig) -> None:
    job = rig.job()
    other = Rig(replace(FINGERPRINT, block_size=16), rig.transport, rig.address, shared_pool=False).job()
    with pytest.raises(Refused, match="block_size 8 against 16"):
        await rig.transfer(other)
    assert isinstance(job.landing.errors[0], Refused)


async def test_late_frames_of_an_old_attempt_land_nowhere(rig: Rig) -> None:
    """The old sender is in mid-transfer when the router has given its reservation up and placed a new attempt."""
    old = rig.job(attempt=0)

    async def new_attempt() -> None:
        old.landing.broken = True
        await rig.transfer(new)
        new.assert_arrived()

    new = rig.job(attempt=1)
    with pytest.raises(TransferFailed, match="lease"):
        await rig.transfer_in_halves(old, between=new_attempt)
    assert len(old.landing.errors) == 1
    new.assert_arrived()


class Gate:
    """Holds every scatter into one landing's blocks until it is opened."""

    def __init__(self, job: Job) -> None:
        self.held = 0
        self._blocks = job.landing.blocks
        self._open = threading.Event()

    def scatter(self, pool: Any, blocks: Any, *rest: Any) -> None:
        if blocks is self._blocks:
            self.held += 1
            assert self._open.wait(30)
        scatter(pool, blocks, *rest)

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def shut(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Job], Gate]]:
    gates: list[Gate] = []

    def shut(job: Job) -> Gate:
        gates.append(Gate(job))
        monkeypatch.setattr(kv_transfer.receiver, "scatter", gates[-1].scatter)
        return gates[-1]

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
        assert job.landing.writers == 1
        assert not job.landing.ended
        gate.open()
        await until(lambda: job.landing.ended)
        assert len(job.landing.errors) == 1


async def test_a_slow_receiver_bounds_what_is_in_memory(
    monkeypatch: pytest.MonkeyPatch, shut: Callable[[Job], Gate]
) -> None:
    """One frame a token and layer, 16 KiB each: HTTP/2 windows hold some, the pipelines a few, and no more is made."""
    fingerprint = replace(FINGERPRINT, num_layers=16, num_kv_heads=8, head_dim=256)
    made: list[int] = []

    def counting(sequence: int, *rest: Any) -> tuple[Data, bytes]:
        made.append(sequence)
        return encode_data(sequence, *rest)

    monkeypatch.setattr(kv_transfer.sender, "encode_data", counting)
    async with grpc_rig(fingerprint, config_with(frame_bytes=16384, frames_in_flight=4)) as rig:
        job = rig.job(prompt_tokens=200)
        gate = shut(job)
        sending = asyncio.create_task(rig.transfer(job, chunk=200))
        await until(lambda: job.landing.writers == 4)
        await _stands_still(made)
        total = 200 * 16
        assert job.landing.writers == 4
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
            sending = asyncio.create_task(sender.send(range(200)))
            await until(lambda: gate.held > 0)
            abandoning = asyncio.create_task(sender.abandon())
            gate.open()
            await asyncio.gather(sending, abandoning)
        assert job.landing.given_up
        assert rig.transport.counters.frames < 200 * 16
        assert rig.transport.counters.failures == rig.received.failures == 0


async def _stands_still(made: list[int]) -> None:
    """Until nothing was added for 100 looks in a row."""
    seen, looks = -1, 0

    def still() -> bool:
        nonlocal seen, looks
        seen, looks = len(made), (looks + 1 if len(made) == seen else 0)
        return looks > 100

    await until(still)


async def test_a_killed_receiver_is_a_lost_worker(rig: Rig) -> None:
    job = rig.job()
    async with peer("receive") as (process, port):
        target = replace(job.target, address=f"127.0.0.1:{port}")

        async def kill() -> None:
            process.send_signal(signal.SIGKILL)
            assert await process.wait() == -signal.SIGKILL

        job.landing.touches = 1  # the landing that counts is in the other process
        with pytest.raises(WorkerLost):
            await rig.transfer_in_halves(replace(job, target=target), between=kill)
    with pytest.raises(WorkerLost):
        await rig.transfer(replace(job, target=target))
    await rig.assert_healthy()


async def test_a_killed_sender_fails_the_landing(rig: Rig) -> None:
    job = rig.job()
    async with peer("send", rig.address) as (process, said):
        assert said == "half"
        await until(lambda: job.landing.touches > 0)
        assert not job.landing.ended
        process.send_signal(signal.SIGKILL)
        assert await process.wait() == -signal.SIGKILL
        await until(lambda: job.landing.ended, seconds=5)
    assert [type(error) for error in job.landing.errors] == [TransferFailed]
    await rig.assert_healthy()


async def test_the_deadline_ends_the_receiver_of_a_frozen_sender(rig: Rig) -> None:
    job = rig.job()
    async with peer("send", rig.address, "2.0") as (process, said):
        assert said == "half"
        process.send_signal(signal.SIGSTOP)
        await until(lambda: job.landing.touches > 0)
        assert not job.landing.ended
        await until(lambda: job.landing.ended, seconds=10)
    assert [type(error) for error in job.landing.errors] == [DeadlineExceeded]
    await rig.assert_healthy()


async def test_closing_the_transport_fails_its_transfers(rig: Rig) -> None:
    job = rig.job()
    with pytest.raises(TransferFailed, match="closed in mid-transfer"):
        await rig.transfer_in_halves(job, between=rig.transport.aclose)
    await until(lambda: job.landing.ended)


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
    await until(lambda: job.landing.ended)


async def test_stopping_the_server_fails_the_landing_and_loses_the_worker() -> None:
    async with grpc_rig(FINGERPRINT, config_with()) as rig:
        job = rig.job()
        with pytest.raises(WorkerLost):
            await rig.transfer_in_halves(job, between=rig.stop)
        await until(lambda: job.landing.ended)
        assert len(job.landing.errors) == 1
