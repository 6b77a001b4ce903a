"""Both ends of a KV transfer for tests: real pools, real block tables, and reservations that note it all
(kv_reservations.py).

A carrier joins the contract suite by one entry in RIGS.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from kv_reservations import FakeReservation, FakeReservations
from torch import Tensor

from kv_transfer.base import Counters, Source, TransferSummary, TransferTarget, Transport
from kv_transfer.carriers.grpc.carrier import GrpcCarrier
from kv_transfer.carriers.local.carrier import LocalTransport
from kv_transfer.carriers.nixl.carrier import NixlCarrier
from kv_transfer.carriers.ray.carrier import RayCarrier
from kv_transfer.carriers.ray.plasma import connect
from kv_transfer.carriers.shm.carrier import ShmCarrier
from kv_transfer.carriers.shm.memory import SharedMemory
from kv_transfer.ends.carrier import Carrier
from kv_transfer.ends.link import MAX_MESSAGE_BYTES
from kv_transfer.ends.service import KVService
from kv_transfer.ends.transport import PushTransport
from kv_transfer.frames.cells import Native
from kv_transfer.frames.int8 import Int8
from kv_transfer.frames.layout import KVLayout
from tandem.config import TandemConfig, parse_config
from tandem.rpc import bind, make_server
from tandem.types import Fingerprint

FINGERPRINT = Fingerprint(
    config_hash="c" * 64,
    weights_hash="w" * 64,
    dtype="float32",
    block_size=8,
    num_layers=3,
    num_kv_heads=2,
    head_dim=16,
    layout=1,
)
POOL_BLOCKS = 64


def config_with(**worker: int | str) -> TandemConfig:
    return parse_config({"worker": {"frame_bytes": 4096, "object_bytes": 4096, "frames_in_flight": 4, **worker}})


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)


async def stands_still(count: Callable[[], int]) -> None:
    """Until it was the same for 100 looks in a row."""
    seen, looks = -1, 0

    def still() -> bool:
        nonlocal seen, looks
        now = count()
        seen, looks = now, (looks + 1 if now == seen else 0)
        return looks > 100

    await until(still)


def random_pool(fingerprint: Fingerprint, seed: int, blocks: int = POOL_BLOCKS) -> Tensor:
    layout = KVLayout.of(fingerprint)
    shape = (layout.num_layers, 2, blocks, layout.block_size, layout.num_kv_heads, layout.head_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(layout.torch_dtype)


def moved_into(memory: SharedMemory, pool: Tensor) -> Tensor:
    shared = torch.frombuffer(memory.allocate(pool.nbytes), dtype=pool.dtype).view(pool.shape)
    return shared.copy_(pool)


def int8_pool(fingerprint: Fingerprint, seed: int, blocks: int = POOL_BLOCKS) -> Tensor:
    """KV that wire dtype int8 holds exactly, however it is cut: multiples of a power of two that is one for each layer,
    K or V, block and head, and in every token 127 of it."""
    layout = KVLayout.of(fingerprint)
    shape = (layout.num_layers, 2, blocks, layout.block_size, layout.num_kv_heads, layout.head_dim)
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-127, 128, shape, generator=generator)
    largest = torch.randint(0, layout.head_dim, (*shape[:5], 1), generator=generator)
    values.scatter_(5, largest, 127)
    scales = 2.0 ** torch.randint(-6, 3, (*shape[:3], 1, layout.num_kv_heads, 1), generator=generator)
    return (values * scales).to(layout.torch_dtype)


def rows_of(pool: Tensor, blocks: Sequence[int], tokens: range) -> Tensor:
    """[L, 2, T, K, D] the plain way: what gather must agree with."""
    size = pool.shape[3]
    rows = [pool[:, :, blocks[token // size], token % size] for token in tokens]
    return torch.stack(rows, dim=2) if rows else pool[:, :, 0, :0]


@dataclass
class Job:
    """One request's transfer, ready to go."""

    source: Source
    target: TransferTarget
    reservation: FakeReservation
    # [L, 2, T, K, D] of the whole prompt, as the receiver must have it.
    expected: Tensor

    def received(self) -> Tensor:
        return rows_of(self.reservation.pool, self.reservation.blocks, range(self.target.prompt_tokens))

    def assert_arrived(self) -> None:
        assert self.reservation.first_token is not None
        assert self.reservation.errors == []
        assert torch.equal(self.received(), self.expected)


class Rig:
    """A sender's and a receiver's pool with one transport between them."""

    def __init__(
        self,
        fingerprint: Fingerprint,
        transport: Transport,
        address: str,
        shared_pool: bool,
        memory: SharedMemory | None = None,
        wire: type[Native | Int8] = Native,
    ) -> None:
        """memory: where the receiver's pool lies, for senders who can write into it.

        wire: in which the transport sends; the KV is such that it arrives exactly.
        """
        self.fingerprint = fingerprint
        self.wire = wire(KVLayout.of(fingerprint))
        self.transport = transport
        self.address = address
        self.reservations = FakeReservations(fingerprint)
        self.receiving_pool = random_pool(fingerprint, seed=1)
        self.one_sided = memory is not None
        if memory is not None:
            self.receiving_pool = moved_into(memory, self.receiving_pool)
        make_pool = int8_pool if wire is Int8 else random_pool
        self.sending_pool = self.receiving_pool if shared_pool else make_pool(fingerprint, seed=2)
        self.service: KVService | None = None
        # The receiving end's, if it is not in the sender's own process.
        self.receiver: Carrier | None = None
        # Stops the receiving server, if there is one.
        self.stop: Callable[[], Awaitable[object]] = asyncio.Event().wait
        self._free = random.Random(3).sample(range(POOL_BLOCKS), POOL_BLOCKS)
        self._sending_free = random.Random(4).sample(range(POOL_BLOCKS), POOL_BLOCKS)

    @property
    def layers(self) -> range:
        return range(self.fingerprint.num_layers)

    @property
    def shared_pool(self) -> bool:
        return self.sending_pool is self.receiving_pool

    def job(self, prompt_tokens: int = 21, cached_tokens: int = 0, name: str = "r1", attempt: int = 0) -> Job:
        """A reservation at the receiver, and the prompt's KV at the sender; the cached prefix is equal on both."""
        count = -(-prompt_tokens // self.fingerprint.block_size)
        blocks = [self._free.pop() for _ in range(count)]
        source_blocks = blocks if self.shared_pool else [self._sending_free.pop() for _ in range(count)]
        target = TransferTarget(
            reservation_id=f"secret-{name}-{attempt}",
            request_id=name,
            attempt=attempt,
            address=self.address,
            cached_tokens=cached_tokens,
            prompt_tokens=prompt_tokens,
            fingerprint=self.fingerprint,
        )
        reservation = FakeReservation(self.receiving_pool, blocks, target, local=self.shared_pool)
        reservation.one_sided = self.one_sided
        self.reservations.by_id[target.reservation_id] = reservation
        source = Source(self.sending_pool, tuple(source_blocks), KVLayout.of(self.fingerprint))
        expected = rows_of(self.sending_pool, source_blocks, range(prompt_tokens)).clone()
        expected[:, :, :cached_tokens] = rows_of(self.receiving_pool, blocks, range(cached_tokens))
        return Job(source, target, reservation, expected)

    def forget(self, job: Job) -> None:
        """Its blocks are for others."""
        assert job.reservation.writers == 0
        del self.reservations.by_id[job.target.reservation_id]
        self._free += job.reservation.blocks
        self._sending_free += job.source.blocks

    def bytes_of(self, tokens: range, chunk: int) -> int:
        """Of payload, when these positions are sent in chunks that begin at 0, each layer of one in one frame."""
        if self.shared_pool:
            return 0
        edges = [tokens.start, *(start for start in range(0, tokens.stop, chunk) if start > tokens.start), tokens.stop]
        return sum(self.wire.payload_bytes(len(self.layers), range(*span)) for span in pairwise(edges))

    async def transfer(self, job: Job, first_token: int = 7, chunk: int = 9) -> TransferSummary:
        """Sends the prompt in chunks, and seals."""
        size = job.target.prompt_tokens
        async with self.transport.open(job.source, job.target) as sender:
            for start in range(0, size, chunk):
                await sender.send(self.layers, range(start, min(start + chunk, size)))
            return await sender.seal(first_token)

    async def transfer_in_halves(self, job: Job, between: Callable[[], Awaitable[object]]) -> TransferSummary:
        """The second half follows `between`, which runs when the first has landed."""
        middle = job.target.prompt_tokens // 2
        async with self.transport.open(job.source, job.target) as sender:
            await sender.send(self.layers, range(middle))
            await until(lambda: job.reservation.touches > 0)
            await between()
            await sender.send(self.layers, range(middle, job.target.prompt_tokens))
            return await sender.seal(7)

    async def assert_healthy(self) -> None:
        """Whatever happened before, a new transfer works."""
        job = self.job(name="health")
        await self.transfer(job)
        job.assert_arrived()
        self.forget(job)

    @property
    def received(self) -> Counters:
        return self.transport.counters if self.service is None else self.service.counters[self.transport.name]


@asynccontextmanager
async def local_rig(fingerprint: Fingerprint, config: TandemConfig) -> AsyncIterator[Rig]:
    reservations = FakeReservations(fingerprint)
    rig = Rig(fingerprint, LocalTransport(reservations), "", shared_pool=True)
    rig.reservations = reservations
    yield rig
    await rig.transport.aclose()


@asynccontextmanager
async def grpc_rig(fingerprint: Fingerprint, config: TandemConfig) -> AsyncIterator[Rig]:
    async with push_rig(fingerprint, config, GrpcCarrier(config.worker), GrpcCarrier(config.worker)) as rig:
        yield rig


@asynccontextmanager
async def int8_rig(fingerprint: Fingerprint, config: TandemConfig) -> AsyncIterator[Rig]:
    """The grpc carrier with the lossy wire dtype, and KV that it does not harm."""
    worker = config.worker.model_copy(update={"wire_dtype": Int8.name})
    async with push_rig(fingerprint, config, GrpcCarrier(worker), GrpcCarrier(worker), wire=Int8) as rig:
        yield rig


@asynccontextmanager
async def ray_rig(fingerprint: Fingerprint, config: TandemConfig) -> AsyncIterator[Rig]:
    """In a process that is part of a Ray cluster: see support/ray_head.py."""
    plasma = connect()
    assert plasma is not None
    sender, receiver = (RayCarrier(config.worker, plasma) for _ in range(2))
    async with push_rig(fingerprint, config, sender, receiver) as rig:
        yield rig


@asynccontextmanager
async def shm_rig(fingerprint: Fingerprint, config: TandemConfig) -> AsyncIterator[Rig]:
    memory = SharedMemory()
    sender, receiver = ShmCarrier(config.worker, SharedMemory()), ShmCarrier(config.worker, memory)
    async with push_rig(fingerprint, config, sender, receiver, memory=memory) as rig:
        yield rig


@asynccontextmanager
async def nixl_rig(fingerprint: Fingerprint, config: TandemConfig) -> AsyncIterator[Rig]:
    worker = config.worker.model_copy(update={"nixl_devices": "lo"})
    sender, receiver = (NixlCarrier(worker, "cpu") for _ in range(2))
    async with push_rig(fingerprint, config, sender, receiver, one_sided=True) as rig:
        yield rig


@asynccontextmanager
async def push_rig(
    fingerprint: Fingerprint,
    config: TandemConfig,
    sender: Carrier,
    receiver: Carrier,
    memory: SharedMemory | None = None,
    wire: type[Native | Int8] = Native,
    one_sided: bool = False,
) -> AsyncIterator[Rig]:
    """The ends of one carrier, as two workers have them."""
    reservations, transport = FakeReservations(fingerprint), PushTransport(sender)
    async with serving(reservations, config, [receiver]) as (service, port, stop):
        rig = Rig(fingerprint, transport, f"127.0.0.1:{port}", shared_pool=False, memory=memory, wire=wire)
        rig.one_sided = rig.one_sided or one_sided
        rig.reservations, rig.service, rig.stop, rig.receiver = reservations, service, stop, receiver
        yield rig
        await transport.aclose()


@asynccontextmanager
async def serving(
    reservations: FakeReservations, config: TandemConfig, carriers: Sequence[Carrier]
) -> AsyncIterator[tuple[KVService, int, Callable[[], Awaitable[object]]]]:
    service = KVService(reservations, config, carriers)
    server = make_server(MAX_MESSAGE_BYTES)
    server.add_generic_rpc_handlers((service,))
    port = bind(server, "127.0.0.1", 0)
    await server.start()
    try:
        yield service, port, lambda: server.stop(None)
    finally:
        await server.stop(None)
        await service.aclose()


MakeRig = Callable[[Fingerprint, TandemConfig], AbstractAsyncContextManager[Rig]]
RIGS: dict[str, MakeRig] = {
    "local": local_rig,
    "grpc": grpc_rig,
    "grpc, int8": int8_rig,
    "ray": ray_rig,
    "shm": shm_rig,
    "nixl": nixl_rig,
}


def shaped(dtype: str, num_kv_heads: int, head_dim: int) -> Fingerprint:
    return replace(FINGERPRINT, dtype=dtype, num_kv_heads=num_kv_heads, head_dim=head_dim)
