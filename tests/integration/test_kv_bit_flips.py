"""A flipped bit of any KV frame, on the socket between a real sender and a real receiver."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
from kv_rig import FINGERPRINT, POOL_BLOCKS, RIGS, Job, Rig, config_with, until
from links import FlippingLink

from kv_transfer.frames.cells import Cells
from kv_transfer.frames.runs import Runs
from tandem.errors import TransferFailed
from tandem.types import Fingerprint

# A whole transfer in one data frame of a few bytes.
SMALL = replace(FINGERPRINT, dtype="float16", num_layers=1, num_kv_heads=1, head_dim=2)
LARGE = replace(FINGERPRINT, num_layers=16, num_kv_heads=8, head_dim=256)
# Two blocks.
PROMPT = 9
KINDS = {
    "grpc": ["open", "data", "seal", "abandon", "done"],
    "nixl": ["open", "writer", "lent", "written", "seal", "abandon", "done"],
    "shm": ["open", "mapped", "locked", "granted", "written", "seal", "abandon", "done"],
}
EACH = [(transport, kind) for transport, kinds in KINDS.items() for kind in kinds]
FROM_RECEIVER = ("mapped", "granted", "lent", "taken", "done")


@pytest.fixture
def link() -> Iterator[FlippingLink]:
    link = FlippingLink()
    yield link
    link.close()


@asynccontextmanager
async def open_rig(link: FlippingLink, transport: str, fingerprint: Fingerprint = SMALL) -> AsyncIterator[Rig]:
    async with RIGS[transport](fingerprint, config_with(frame_bytes=1 << 20, object_bytes=1 << 20)) as rig:
        link.target, rig.address = rig.address, link.address
        yield rig


async def send(rig: Rig, job: Job, abandon: bool) -> None:
    if not abandon:
        await rig.transfer(job)
        return
    async with rig.transport.open(job.source, job.target) as sender:
        await sender.send(rig.layers, range(PROMPT))
        await sender.abandon()


async def sizes(rig: Rig, link: FlippingLink) -> dict[str, int]:
    """Bits of each kind of frame, from transfers without a fault."""
    seen: dict[str, int] = {}

    def look(kind: str, size: int) -> None:
        seen[kind] = size * 8

    link.flip = look
    for abandon in (True, False):
        job = rig.job(PROMPT)
        await send(rig, job, abandon)
        rig.forget(job)
    job.assert_arrived()
    assert rig.transport.counters.corrupt_frames == rig.received.corrupt_frames == 0
    return seen


async def fail_by(rig: Rig, link: FlippingLink, kind: str, bit: int) -> None:
    """One transfer with one flipped bit: it fails, the end that got the frame counts it, and both ends are free."""
    job = rig.job(PROMPT)
    others = [block for block in range(POOL_BLOCKS) if block not in job.reservation.blocks]
    before = rig.receiving_pool[:, :, others].clone()
    receiver, sender = rig.received.corrupt_frames, rig.transport.counters.corrupt_frames
    link.flip_next(kind, bit)
    with pytest.raises(TransferFailed):
        await send(rig, job, abandon=kind == "abandon")
    assert link.flipped == [(kind, bit)], "the fault took effect"
    if kind == "open":
        assert not job.reservation.ended, "it waits for its true sender"
        await rig.transfer(job)
        job.assert_arrived()
    await until(lambda: job.reservation.ended)
    assert_never_wrong(job)
    assert torch.equal(rig.receiving_pool[:, :, others], before), "nobody else's blocks were written"
    if kind in FROM_RECEIVER:
        sender += 1
    else:
        receiver += 1
        assert kind == "open" or len(job.reservation.errors) == 1
    assert (rig.received.corrupt_frames, rig.transport.counters.corrupt_frames) == (receiver, sender)
    await until(lambda: job.reservation.writers == 0)
    rig.forget(job)


def assert_never_wrong(job: Job) -> None:
    """Decode starts on what was sealed, and on nothing else."""
    if job.reservation.first_token is not None:
        assert torch.equal(job.received(), job.expected)


async def test_every_bit_of_a_data_frame(link: FlippingLink) -> None:
    async with open_rig(link, "grpc") as rig:
        bits = (await sizes(rig, link))["data"]
        for bit in range(bits):
            await fail_by(rig, link, "data", bit)
        assert rig.received.failures == rig.received.corrupt_frames == bits > 800
        await rig.assert_healthy()


@pytest.mark.parametrize(("transport", "kind"), EACH)
async def test_a_bit_of_every_byte_of_every_frame(
    request: pytest.FixtureRequest, link: FlippingLink, transport: str, kind: str
) -> None:
    if transport == "nixl":
        request.getfixturevalue("nixl")
    dice = random.Random(kind)
    async with open_rig(link, transport) as rig:
        for byte in range((await sizes(rig, link))[kind] // 8):
            await fail_by(rig, link, kind, 8 * byte + dice.randrange(8))
        await rig.assert_healthy()


async def test_frames_that_place_a_payload_elsewhere(ray_node: str, link: FlippingLink) -> None:
    """Transport ray: the payload is not on the link; where it lies is, and that it was taken."""
    dice = random.Random(2)
    async with open_rig(link, "ray") as rig:
        bits = await sizes(rig, link)
        for kind in ("placed", "taken"):
            for start in range(0, bits[kind], 64):
                await fail_by(rig, link, kind, dice.randrange(start, min(start + 64, bits[kind])))
        await rig.assert_healthy()


async def test_a_bit_anywhere_in_large_frames(link: FlippingLink) -> None:
    """Of a MiB, cut by HTTP/2 and verified by threads while others are on their way."""
    dice = random.Random(1)
    async with open_rig(link, "grpc", LARGE) as rig:
        for number in range(6):
            job = rig.job(prompt_tokens=120)
            flip_payload(link, number, dice)
            with pytest.raises(TransferFailed, match="checksum"):
                await rig.transfer(job, chunk=120)
            assert len(link.flipped) == 1
            await until(partial(lambda reservation: reservation.ended, job.reservation))
            assert job.reservation.first_token is None
            rig.forget(job)
        assert rig.received.corrupt_frames == 6
        await rig.assert_healthy()


def flip_payload(link: FlippingLink, number: int, dice: random.Random) -> None:
    """Of the data frame of that number."""
    came = 0
    link.flipped.clear()

    def flip(kind: str, size: int) -> int | None:
        nonlocal came
        came += kind == "data"
        return dice.randrange(size * 4, size * 8) if kind == "data" and came == number + 1 else None

    link.flip = flip


async def test_a_bit_of_the_shared_memory(link: FlippingLink, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transport shm: flipped after the sender took the checksum, before the receiver looks."""
    spoiled: list[Cells] = []
    copy = Cells.copy_from

    def spoil(cells: Cells, payload: Runs) -> int:
        crc = copy(cells, payload)
        if not spoiled:
            entry, slot = divmod(cells.tokens.start, cells.pool.shape[3])
            cells.pool.view(torch.uint8)[cells.layers.start, 1, cells.blocks[entry], slot, 0, 0] ^= 1
            spoiled.append(cells)
        return crc

    monkeypatch.setattr(Cells, "copy_from", spoil)
    async with open_rig(link, "shm", LARGE) as rig:
        job = rig.job(prompt_tokens=50, cached_tokens=11)
        with pytest.raises(TransferFailed, match=r"payload of KV frame \d fails its checksum"):
            await rig.transfer(job)
        assert spoiled, "the fault took effect"
        await until(lambda: job.reservation.ended and not job.reservation.writers)
        assert job.reservation.first_token is None
        assert rig.received.corrupt_frames == 1
        await rig.assert_healthy()
