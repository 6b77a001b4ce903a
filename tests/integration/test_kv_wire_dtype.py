"""Wire dtype int8 on real sockets: any KV within the bound, spoiled scales, and real workers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import torch
from kv_rig import FINGERPRINT, Rig, config_with, int8_rig, random_pool, shm_rig, until
from service import running_service

import kv_transfer.ends.link
from kv_transfer.carriers.shm.carrier import ShmCarrier
from kv_transfer.ends.link import MAX_MESSAGE_BYTES, SERVICE
from kv_transfer.ends.sender import opening_of
from kv_transfer.frames.codec import encode, frame_of
from kv_transfer.frames.messages import Data
from kv_transfer.frames.runs import Runs
from tandem.errors import Refused, TransferFailed
from tandem.rpc import make_channel


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with int8_rig(FINGERPRINT, config_with()) as rig:
        yield rig
        await until(lambda: all(reservation.writers == 0 for reservation in rig.reservations.by_id.values()))


async def test_any_kv_arrives_within_half_a_scale_and_in_a_quarter_of_the_bytes(rig: Rig) -> None:
    rig.sending_pool.copy_(random_pool(FINGERPRINT, seed=9))
    job = rig.job(prompt_tokens=64)
    summary = await rig.transfer(job, chunk=32)
    assert job.reservation.first_token is not None
    # Of a block, layer, side and head: one scale. [L, 2, 8 blocks, 8 tokens, K, D]
    sent, came = (rows.unflatten(2, (8, 8)) for rows in (job.expected, job.received()))
    half = sent.abs().amax(dim=(3, 5), keepdim=True) / 127 / 2
    assert ((sent - came).abs() <= half * 1.0001).all()
    assert not torch.equal(sent, came), "the test would prove nothing"
    native = 64 * job.source.layout.token_bytes
    assert summary.bytes == native // 4 + 3 * 2 * 8 * 2 * 4


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
async def test_kv_that_is_not_finite_is_refused_by_the_sender(rig: Rig, odd: float) -> None:
    job = rig.job()
    rig.sending_pool[1, 0, job.source.blocks[2], 1, 1, 7] = odd
    with pytest.raises(Refused, match="KV holds infinity or NaN"):
        await rig.transfer(job)
    await until(lambda: job.reservation.ended)
    assert [type(error) for error in job.reservation.errors] == [TransferFailed]
    assert job.received().isfinite().all()
    rig.sending_pool[1, 0, job.source.blocks[2], 1, 1, 7] = 1
    await rig.assert_healthy()


@pytest.mark.parametrize("part", ["scales", "values"])
async def test_a_flipped_bit_of_a_scale_or_a_value_fails_the_checksum(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    flipped: list[int] = []

    def spoiled(sequence: int, layers: range, tokens: range, payload: Runs) -> tuple[Data, bytes]:
        """Its second frame's payload changes after its checksum was taken."""
        data, frame = frame_of(sequence, layers, tokens, payload)
        if sequence == 1:
            at = len(frame) - payload.nbytes + (0 if part == "scales" else int(payload.sizes[0])) + 3
            frame = frame[:at] + bytes([frame[at] ^ 0x40]) + frame[at + 1 :]
            flipped.append(sequence)
        return data, frame

    monkeypatch.setattr(kv_transfer.ends.link, "frame_of", spoiled)
    job = rig.job()
    with pytest.raises(TransferFailed, match="payload of KV frame 1 fails its checksum"):
        await rig.transfer(job)
    await until(lambda: job.reservation.ended)
    assert flipped
    assert rig.received.corrupt_frames == 1
    monkeypatch.undo()
    await rig.assert_healthy()


async def test_what_is_written_into_the_pool_itself_is_native_only() -> None:
    async with shm_rig(FINGERPRINT, config_with()) as rig:
        job = rig.job()
        opening = encode(opening_of(job.target, "int8"))
        async with make_channel(rig.address, MAX_MESSAGE_BYTES) as channel:
            call = channel.stream_stream(f"/{SERVICE}/{ShmCarrier.method}")(iter([opening]), timeout=20)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "native KV, not int8" in str(caught.value.details())
        assert [type(error) for error in job.reservation.errors] == [Refused]
        await rig.assert_healthy()


# Two services start one after the other: seconds on quiet cores.
@pytest.mark.timeout(300)
def test_real_workers_send_a_quarter_of_the_bytes_and_say_nearly_the_same(tmp_path: Path) -> None:
    """The prefill worker decides; the decode worker is configured as ever."""
    prompt = [3 + at * 7 % 120 for at in range(200)]
    answers = {}
    for name in ("native", "int8"):
        with running_service(tmp_path / name, prefill=0, wait=False, router={"transport": "grpc"}) as service:
            service.start_worker("prefill-0", "prefill", worker={"wire_dtype": name})
            service.wait_joined(2)
            answers[name] = service.client.complete(prompt, max_tokens=32, ignore_eos=True).choices[0]
    native, int8 = (answers[name].report for name in ("native", "int8"))
    assert native.transport == int8.transport == "grpc"
    assert 3.2 < native.kv_bytes / int8.kv_bytes < 4
    theirs, ours = ([token.id for token in answers[name].tokens] for name in ("native", "int8"))
    assert len(ours) == 32
    assert ours[0] == theirs[0], "the prefill worker's own KV is never harmed"
    same = sum(one == other for one, other in zip(ours, theirs, strict=True))
    assert same >= 16, (ours, theirs)
