"""What every transport promises. A new one joins by an entry in kv_rig.RIGS."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import torch
from kv_rig import FINGERPRINT, RIGS, MakeRig, Rig, config_with, shaped, until

from kv_transfer.base import Source
from tandem.errors import DeadlineExceeded, Refused, TransferFailed

# The fixtures that make a transport possible.
NEEDS = {"ray": "ray_node", "nixl": "nixl"}


@pytest.fixture(params=[*RIGS, "grpc by threads", "shm by threads"])
def make_rig(request: pytest.FixtureRequest) -> MakeRig:
    transport, how, _ = request.param.partition(" by threads")
    if how:
        request.getfixturevalue("by_threads")
    if transport in NEEDS:
        request.getfixturevalue(NEEDS[transport])
    return RIGS[transport]


@pytest.fixture
async def rig(make_rig: MakeRig) -> AsyncIterator[Rig]:
    async with make_rig(FINGERPRINT, config_with()) as rig:
        yield rig
        await until(lambda: all(reservation.writers == 0 for reservation in rig.reservations.by_id.values()))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("heads", "head_dim"), [(8, 16), (1, 64)], ids=["mha", "gqa"])
async def test_bytes_are_exact(make_rig: MakeRig, dtype: str, heads: int, head_dim: int) -> None:
    async with make_rig(shaped(dtype, heads, head_dim), config_with()) as rig:
        for prompt, cached in ((1, 0), (8, 0), (21, 0), (21, 5), (21, 8), (24, 16), (21, 20)):
            job = rig.job(prompt, cached, name=f"r{prompt}-{cached}")
            foreign = rig.receiving_pool.clone()
            summary = await rig.transfer(job, first_token=42)
            job.assert_arrived()
            assert job.reservation.first_token == 42
            assert summary.bytes == rig.bytes_of(range(cached, prompt), chunk=9)
            assert job.reservation.summary is not None
            assert job.reservation.summary.bytes == summary.bytes
            _assert_untouched_elsewhere(rig, foreign, job.reservation.blocks)


def _assert_untouched_elsewhere(rig: Rig, before: torch.Tensor, blocks: tuple[int, ...]) -> None:
    others = [block for block in range(before.shape[2]) if block not in blocks]
    assert torch.equal(rig.receiving_pool[:, :, others], before[:, :, others])


async def test_a_full_prefix_hit_moves_nothing_and_seals(rig: Rig) -> None:
    job = rig.job(prompt_tokens=16, cached_tokens=16)
    summary = await rig.transfer(job)
    assert (summary.bytes, summary.frames) == (0, 0)
    job.assert_arrived()


async def test_many_at_once(rig: Rig) -> None:
    jobs = [rig.job(9 + index % 8, index % 3, name=f"r{index}") for index in range(24)]
    await asyncio.gather(*(rig.transfer(job, chunk=3 + index % 5) for index, job in enumerate(jobs)))
    for job in jobs:
        job.assert_arrived()
    assert rig.transport.counters.transfers == rig.received.transfers == 24
    assert rig.transport.counters.failures == rig.received.failures == 0
    assert rig.transport.counters.bytes == rig.received.bytes
    assert rig.transport.counters.frames == rig.received.frames


async def test_layers_of_a_chunk_may_leave_one_by_one(rig: Rig) -> None:
    job = rig.job(prompt_tokens=21, cached_tokens=3)
    async with rig.transport.open(job.source, job.target) as sender:
        for tokens in (range(10), range(10, 21)):
            for layer in rig.layers:
                await sender.send(range(layer, layer + 1), tokens)
        await sender.seal(7)
    job.assert_arrived()


async def test_what_was_sent_before_the_end_of_prefill_is_hidden(rig: Rig) -> None:
    job = rig.job(prompt_tokens=40)
    async with rig.transport.open(job.source, job.target) as sender:
        await sender.send(rig.layers, range(30))
        prefilled_s = time.monotonic()
        await sender.send(rig.layers, range(30, 40))
        summary = await sender.seal(7, prefilled_s)
    if rig.shared_pool:
        assert summary.seconds == 0
    else:
        assert 0 < summary.hidden_seconds < summary.seconds
        counters = rig.transport.counters
        assert (counters.seconds, counters.hidden_seconds) == (summary.seconds, summary.hidden_seconds)


async def test_a_layer_that_was_not_sent_is_missed_at_the_seal(rig: Rig) -> None:
    job = rig.job(prompt_tokens=10)
    async with rig.transport.open(job.source, job.target) as sender:
        await sender.send(range(2), range(10))
        await until(lambda: job.reservation.touches > 0)
        with pytest.raises(TransferFailed, match="layer 2, positions"):
            await sender.seal(7)
    await until(lambda: job.reservation.ended)
    assert job.reservation.first_token is None


async def test_the_lease_is_touched_as_kv_comes(rig: Rig) -> None:
    job = rig.job()
    async with rig.transport.open(job.source, job.target) as sender:
        await sender.send(rig.layers, range(10))
        await until(lambda: job.reservation.touches > 0)
        assert not job.reservation.ended
        await sender.send(rig.layers, range(10, 21))
        await sender.seal(1)
    job.assert_arrived()


async def test_a_seal_before_the_last_token_is_refused(rig: Rig) -> None:
    job = rig.job()
    async with rig.transport.open(job.source, job.target) as sender:
        await sender.send(rig.layers, range(20))
        # Before that the receiver may not have heard of the transfer, and then its reservation goes on waiting.
        await until(lambda: job.reservation.touches > 0)
        with pytest.raises(TransferFailed, match=r"positions \[20, 21\) is missing"):
            await sender.seal(7)
    await until(lambda: job.reservation.ended)
    assert job.reservation.first_token is None
    await rig.assert_healthy()


@pytest.mark.parametrize(
    ("second", "why"),
    [(range(5, 21), "twice"), (range(12, 21), "gap"), (range(10, 22), "outside")],
    ids=["overlap", "gap", "beyond"],
)
async def test_ranges_must_ascend_without_gaps(rig: Rig, second: range, why: str) -> None:
    job = rig.job()
    async with rig.transport.open(job.source, job.target) as sender:
        await sender.send(rig.layers, range(10))
        await until(lambda: job.reservation.touches > 0)
        with pytest.raises(TransferFailed, match=why):
            await sender.send(rig.layers, second)
    await until(lambda: job.reservation.ended)
    assert job.reservation.first_token is None


@pytest.mark.parametrize("wrong", ["reservation_id", "request_id", "attempt"])
async def test_a_stranger_is_refused_and_the_reservation_waits_on(rig: Rig, wrong: str) -> None:
    job = rig.job(attempt=2)
    stranger = replace(job.target, **{wrong: 1 if wrong == "attempt" else "somebody-else"})
    with pytest.raises(TransferFailed):
        await rig.transfer(replace(job, target=stranger))
    assert not job.reservation.ended
    assert job.reservation.touches == 0
    await rig.transfer(job)
    job.assert_arrived()


async def test_kv_that_comes_another_way_than_promised_is_refused(rig: Rig) -> None:
    """Above all into blocks that the receiving worker computes in, by whoever learnt the reservation's id."""
    job = rig.job()
    job.reservation.local = not job.reservation.local
    with pytest.raises(TransferFailed, match="is to be"):
        await rig.transfer(job)
    assert not job.reservation.ended
    job.reservation.local = not job.reservation.local
    await rig.transfer(job)
    job.assert_arrived()


async def test_another_model_is_refused_by_name(rig: Rig) -> None:
    job = rig.job()
    other = replace(job.target, fingerprint=replace(FINGERPRINT, weights_hash="x" * 64))
    with pytest.raises(Refused, match=r"weights_hash wwww.* against xxxx"):
        await rig.transfer(replace(job, target=other))
    await until(lambda: job.reservation.ended)
    assert isinstance(job.reservation.errors[0], Refused)
    await rig.assert_healthy()


@pytest.mark.parametrize("change", [{"cached_tokens": 3}, {"prompt_tokens": 20}], ids=["cached", "prompt"])
async def test_both_ends_must_agree_on_what_travels(rig: Rig, change: dict[str, int]) -> None:
    job = rig.job()
    with pytest.raises(TransferFailed, match="the sender offers positions"):
        await rig.transfer(replace(job, target=replace(job.target, **change)))
    await until(lambda: job.reservation.ended)


async def test_a_source_of_another_layout_is_refused_before_anything_is_sent(rig: Rig) -> None:
    job = rig.job()
    for source in (
        replace(job.source, layout=replace(job.source.layout, block_size=4)),
        replace(job.source, pool=job.source.pool.half()),
        replace(job.source, blocks=job.source.blocks[:1]),
        replace(job.source, blocks=(*job.source.blocks[:2], 10_000)),
    ):
        with pytest.raises(Refused):
            await _open_and_leave(rig, replace(job, source=source).source, job.target.reservation_id)
    assert job.reservation.touches == 0


async def _open_and_leave(rig: Rig, source: Source, reservation_id: str) -> None:
    job = rig.job(name="probe", prompt_tokens=21)
    async with rig.transport.open(source, job.target):
        pytest.fail(f"{reservation_id} opened")


async def test_a_reservation_takes_one_transfer(rig: Rig) -> None:
    job = rig.job()
    async with rig.transport.open(job.source, job.target) as sender:
        await sender.send(rig.layers, range(10))
        await until(lambda: job.reservation.touches > 0)
        with pytest.raises(TransferFailed, match="already has its transfer"):
            await rig.transfer(job)
        await sender.send(rig.layers, range(10, 21))
        await sender.seal(5)
    job.assert_arrived()
    with pytest.raises(TransferFailed, match="already has its transfer"):
        await rig.transfer(job)
    job.assert_arrived()


async def test_leaving_without_a_seal_aborts(rig: Rig) -> None:
    job = rig.job()
    async with rig.transport.open(job.source, job.target) as sender:
        await sender.send(rig.layers, range(10))
        await until(lambda: job.reservation.touches > 0)
    await until(lambda: job.reservation.ended)
    assert [type(error) for error in job.reservation.errors] == [TransferFailed]
    assert rig.received.failures == 1
    await rig.assert_healthy()


@pytest.mark.parametrize("sent", [0, 10, 21])
async def test_an_abandoned_transfer_frees_both_ends_and_is_no_failure(rig: Rig, sent: int) -> None:
    """The first token was the last: nobody needs the KV."""
    job = rig.job()
    async with rig.transport.open(job.source, job.target) as sender:
        await sender.send(rig.layers, range(sent))
        await sender.abandon()
        assert job.reservation.given_up
    assert job.reservation.errors == []
    for counters in (rig.transport.counters, rig.received):
        assert (counters.transfers, counters.failures) == (0, 0)
    await rig.assert_healthy()


async def test_a_cancel_in_mid_transfer_aborts(rig: Rig) -> None:
    job = rig.job()
    task = asyncio.create_task(rig.transfer_in_halves(job, between=asyncio.Event().wait))
    await until(lambda: job.reservation.touches > 0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: job.reservation.ended)
    assert [type(error) for error in job.reservation.errors] == [TransferFailed]
    await rig.assert_healthy()


async def test_an_error_of_the_sender_aborts(rig: Rig) -> None:
    job = rig.job()

    async def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await rig.transfer_in_halves(job, between=fail)
    await until(lambda: job.reservation.ended)
    assert len(job.reservation.errors) == 1


async def test_a_broken_lease_ends_the_transfer(rig: Rig) -> None:
    """At once, where a peer sends: it may never send another frame."""
    job = rig.job()
    before: list[torch.Tensor] = []

    async def break_lease() -> None:
        # Some write for as long as they are open, the others have done with the first half.
        await until(lambda: job.reservation.writers == (1 if rig.shared_pool or rig.one_sided else 0))
        job.reservation.break_lease()
        before.append(job.received().clone())
        if not rig.shared_pool:
            await until(lambda: job.reservation.ended)

    with pytest.raises(TransferFailed, match="lease"):
        await rig.transfer_in_halves(job, between=break_lease)
    await until(lambda: job.reservation.ended)
    assert len(job.reservation.errors) == 1
    if not rig.one_sided:  # where blocks stay in use until the sender is gone, what is in them concerns nobody
        assert torch.equal(job.received(), before[0])
    await until(lambda: job.reservation.writers == 0)
    await rig.assert_healthy()


async def test_a_reservation_that_refuses_the_seal_fails_it(rig: Rig) -> None:
    job = rig.job()
    job.reservation.refuse_seal = TransferFailed("the lease broke before the seal")
    with pytest.raises(TransferFailed, match="before the seal"):
        await rig.transfer(job)
    await until(lambda: job.reservation.ended)
    assert [error.message for error in job.reservation.errors] == ["the lease broke before the seal"]


async def test_the_deadline_ends_both_ends(rig: Rig) -> None:
    job = rig.job()
    target = replace(job.target, deadline_s=0.3)
    loop = asyncio.get_running_loop()
    started = loop.time()
    with pytest.raises(DeadlineExceeded):
        await rig.transfer_in_halves(
            replace(job, target=target), between=lambda: until(lambda: loop.time() - started > 0.35)
        )
    await until(lambda: job.reservation.ended)
    # The sender's end, when its clock is first, looks like any other leaving.
    assert type(job.reservation.errors[0]) in (DeadlineExceeded, TransferFailed)
    await rig.assert_healthy()


async def test_a_surrounding_timeout_is_a_cancel(rig: Rig) -> None:
    job = rig.job()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(rig.transfer_in_halves(job, between=asyncio.Event().wait), 0.3)
    await until(lambda: job.reservation.ended)
    assert len(job.reservation.errors) == 1
