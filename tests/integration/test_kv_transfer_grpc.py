"""Faults of frames and of what comes in at the port of the gRPC transport; after each the service still works."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import grpc
import pytest
from kv_rig import FINGERPRINT, Job, Rig, config_with, grpc_rig, until

import kv_transfer.ends.receiver
import kv_transfer.ends.sender
from kv_transfer.ends.link import MAX_MESSAGE_BYTES
from kv_transfer.ends.sender import opening_of
from kv_transfer.frames.cells import Cells
from kv_transfer.frames.codec import MAX_FRAME_BYTES, decode, encode, frame_of
from kv_transfer.frames.messages import Data, Done, Seal
from tandem.errors import Refused, TransferFailed
from tandem.rpc import client_options, error_from_rpc, make_channel


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with grpc_rig(FINGERPRINT, config_with()) as rig:
        yield rig
        await until(lambda: all(reservation.writers == 0 for reservation in rig.reservations.by_id.values()))


async def push(rig: Rig, frames: list[bytes]) -> Done:
    """Frames as they are, from a sender with no manners."""
    done, _ = decode(await asyncio.to_thread(_push, rig.address, frames))
    assert isinstance(done, Done)
    return done


def _push(address: str, frames: list[bytes]) -> bytes:
    """Not by grpc.aio: there a write that meets the end of a call hides why the server ended it."""
    with grpc.insecure_channel(address, options=client_options(2 * MAX_MESSAGE_BYTES)) as channel:
        answer: bytes = channel.stream_unary("/tandem.v1.KVTransfer/Push")(iter(frames), timeout=20)
        return answer


async def status_of_push(rig: Rig, frames: list[bytes]) -> Any:
    with pytest.raises(grpc.RpcError) as caught:
        await push(rig, frames)
    return caught.value


def data_frame(job: Job, sequence: int, layers: range, tokens: range) -> tuple[Data, bytes]:
    return frame_of(sequence, layers, tokens, Cells(job.source.pool, job.source.blocks, layers, tokens).pieces())


def good_frames(job: Job) -> list[bytes]:
    data = [data_frame(job, layer, range(layer, layer + 1), range(21)) for layer in range(3)]
    checksum = 0
    for header, _ in data:
        checksum = kv_transfer.ends.receiver.chain_checksum(checksum, header)
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
    "second open": (lambda frames: [*frames[:2], *frames[:1], *frames[2:]], "a frame of kind open came"),
    "early seal": (lambda frames: [*frames[:3], frames[-1]], "missing at the seal"),
    "no seal": (lambda frames: frames[:-1], "left before the seal"),
    "data after the seal": (lambda frames: [*frames, frames[1]], "after the seal"),
    "second seal": (lambda frames: [*frames, frames[-1]], "after the seal"),
    "wrong totals": (
        with_frame(4, lambda frame: encode(replace(decode(frame)[0], checksum=1))),  # type: ignore[type-var]
        "the seal counts",
    ),
}


async def test_a_stream_that_opens_no_transfer_is_ended(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_transfer.ends.receiver, "OPEN_TIMEOUT_S", 0.2)
    async with make_channel(rig.address) as channel:
        call: Any = channel.stream_stream("/tandem.v1.KVTransfer/Push")()
        async with asyncio.timeout(10):
            assert await call.code() is grpc.StatusCode.DATA_LOSS
        assert "no open frame within 0.2 s" in await call.details()
    assert rig.received.failures == 1
    await rig.assert_healthy()


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
    (error,) = job.reservation.errors
    assert isinstance(error, TransferFailed)
    assert rig.received.failures == 1
    assert rig.received.corrupt_frames == (name in ("corrupt payload", "corrupt header", "garbage"))
    await rig.assert_healthy()


@pytest.mark.parametrize(
    "frames",
    [[], [b"\x00" * 12], [os.urandom(5000)], [b"TKVF" + os.urandom(5000)], [encode(Seal(1, 0, 0, 0))]],
    ids=["nothing", "zeros", "noise", "noise with magic", "seal first"],
)
async def test_garbage_instead_of_an_opening_touches_no_reservation(rig: Rig, frames: list[bytes]) -> None:
    job = rig.job()
    failure = await status_of_push(rig, frames)
    assert failure.code() is grpc.StatusCode.DATA_LOSS
    assert not job.reservation.ended
    await rig.assert_healthy()


async def test_a_frame_of_the_wrong_size_for_its_cells_is_refused(rig: Rig) -> None:
    job = rig.job()
    payload = Cells(job.source.pool, job.source.blocks, range(1), range(20)).pieces()
    _, frame = frame_of(0, range(1), range(21), payload)
    failure = await status_of_push(rig, [good_frames(job)[0], frame])
    assert "its cells take" in str(failure.details())
    assert len(job.reservation.errors) == 1


async def test_a_payload_in_another_wire_dtype_than_announced_is_refused_by_its_size(rig: Rig) -> None:
    job = rig.job()
    opening = encode(opening_of(job.target, "int8"))
    failure = await status_of_push(rig, [opening, *good_frames(job)[1:]])
    assert "its cells take" in str(failure.details())
    assert len(job.reservation.errors) == 1


async def test_an_unknown_wire_dtype_is_refused_by_name(rig: Rig) -> None:
    job = rig.job()
    failure = await status_of_push(rig, [encode(opening_of(job.target, "int3")), *good_frames(job)[1:]])
    assert failure.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "wire dtype 'int3' is unknown to this worker; it takes native, int8" in str(failure.details())
    assert [type(error) for error in job.reservation.errors] == [Refused]
    await rig.assert_healthy()


async def test_a_message_over_the_cap_is_refused_by_grpc(rig: Rig) -> None:
    job = rig.job()
    failure = await status_of_push(rig, [good_frames(job)[0], bytes(MAX_FRAME_BYTES + 1)])
    assert failure.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await until(lambda: job.reservation.ended)
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
    assert isinstance(job.reservation.errors[0], Refused)


async def test_late_frames_of_an_old_attempt_land_nowhere(rig: Rig) -> None:
    """The old sender is in mid-transfer when the router has given its reservation up and placed a new attempt."""
    old = rig.job(attempt=0)

    async def new_attempt() -> None:
        old.reservation.broken = True
        await rig.transfer(new)
        new.assert_arrived()

    new = rig.job(attempt=1)
    with pytest.raises(TransferFailed, match="lease"):
        await rig.transfer_in_halves(old, between=new_attempt)
    assert len(old.reservation.errors) == 1
    new.assert_arrived()
