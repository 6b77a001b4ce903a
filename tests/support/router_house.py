"""The real router with scripted workers around it, and what tests of it need."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc
from scripted_worker import Cluster, ScriptedWorker, eventually
from tokenizers import Tokenizer

from router.app import open_router
from tandem import rpc, wire
from tandem.config import TINY_MODEL, TandemConfig, parse_config
from tandem.types import ChoiceFinished, Delta, Event, Role, SamplingParams
from tandem.v1 import generation_pb2, generation_pb2_grpc

TOKENIZER = Tokenizer.from_file(str(TINY_MODEL / "tokenizer.json"))
ROOT = Path(__file__).parents[2]
# Log probabilities on a token, so that one event fills HTTP/2's window and the router's write waits for its reader.
WIDER_THAN_A_WINDOW = 15_000
PREFILL, DECODE = [Role.PREFILL], [Role.DECODE]


def configuration(**router: Any) -> TandemConfig:
    return parse_config(
        {"router": {"port": 0, "http_port": -1, "heartbeat_timeout_s": 5.0, "drain_timeout_s": 5.0, **router}}
    )


@contextmanager
def listening(lines: list[str]) -> Iterator[None]:
    """Notes what the router says about workers that have become routable."""

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "is routable" in record.getMessage():
                lines.append(record.getMessage())

    logger, handler = logging.getLogger("router.pool.worker"), Notes()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class House:
    """A router, its client and its workers."""

    def __init__(self, address: str, channel: grpc.aio.Channel, stack: AsyncExitStack) -> None:
        self.cluster = Cluster(address)
        self.stub: Any = generation_pb2_grpc.GenerationStub(channel)  # type: ignore[no-untyped-call]
        self._stack = stack
        self.routable_log: list[str] = []
        stack.enter_context(listening(self.routable_log))

    async def join(self, worker_id: str, roles: list[Role] | None = None, **changes: Any) -> ScriptedWorker:
        """Returns when requests can be placed on it."""
        worker = await self.start(worker_id, roles, **changes)
        await eventually(lambda: worker.directives)
        await self.routable(worker_id)
        return worker

    async def start(self, worker_id: str, roles: list[Role] | None = None, **changes: Any) -> ScriptedWorker:
        return await self._stack.enter_async_context(
            self.cluster.worker(worker_id, roles or [Role.PREFILL, Role.DECODE], **changes)
        )

    async def routable(self, worker_id: str) -> None:
        """The router's log says so; nothing else shows it before a request does."""
        await eventually(lambda: any(worker_id in line for line in self.routable_log))
        self.routable_log.clear()

    async def pair(self, **changes: Any) -> tuple[ScriptedWorker, ScriptedWorker]:
        return await self.join("p1", PREFILL, **changes), await self.join("d1", DECODE, **changes)

    def call(self, max_tokens: int = 4, timeout: float | None = 20, **fields: Any) -> Any:
        sampling = fields.pop("sampling", None) or SamplingParams(max_tokens=max_tokens)
        fields.setdefault("token_ids", generation_pb2.TokenIds(ids=[1, 2, 3]))
        if "text" in fields:
            del fields["token_ids"]
        request = generation_pb2.GenerateRequest(sampling=wire.sampling_to_wire(sampling), **fields)
        return self.stub.Generate(request, timeout=timeout)

    async def status(self, check_integrity: bool = False) -> generation_pb2.StatusResponse:
        request = generation_pb2.StatusRequest(check_integrity=check_integrity)
        answer: generation_pb2.StatusResponse = await self.stub.Status(request)
        return answer

    async def check_empty(self) -> None:
        """Law 3, as far as scripted workers can tell."""
        await eventually(lambda: all(worker.held_requests == 0 for worker in self.cluster.workers.values()))
        await eventually_status(self, lambda status: status.live_requests == 0)


def narrow_channel(address: str) -> grpc.aio.Channel:
    """Without bandwidth probes, which would widen HTTP/2's window of 64 KiB until a slow reader's events fit in."""
    return grpc.aio.insecure_channel(address, options=[*rpc.client_options(), ("grpc.http2.bdp_probe", 0)])


@asynccontextmanager
async def open_house(config: TandemConfig) -> AsyncIterator[House]:
    async with (
        open_router(config) as address,
        narrow_channel(address) as channel,
        AsyncExitStack() as stack,
    ):
        yield House(address, channel, stack)


async def collect(call: Any) -> list[Event]:
    """Raises the TandemError that ended the call."""
    events: list[Event] = []
    try:
        while (message := await call.read()) is not grpc.aio.EOF:
            events.append(wire.event_from_wire(message))
    except grpc.aio.AioRpcError as error:
        raise rpc.error_from_rpc(error) from None
    return events


async def next_event(call: Any) -> Event:
    return wire.event_from_wire(await asyncio.wait_for(call.read(), 5))


def text_of(events: list[Event], choice: int = 0) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta) and event.choice == choice)


def ids_of(events: list[Event], choice: int = 0) -> list[int]:
    deltas = [event for event in events if isinstance(event, Delta) and event.choice == choice]
    return [token.id for delta in deltas for token in delta.tokens]


def finish_of(events: list[Event], choice: int = 0) -> ChoiceFinished:
    (finish,) = [event for event in events if isinstance(event, ChoiceFinished) and event.choice == choice]
    return finish


def spell(house: House, text: str) -> list[int]:
    house.cluster.output = TOKENIZER.encode(text, add_special_tokens=False).ids
    return house.cluster.output


async def eventually_status(house: House, condition: Any) -> None:
    """Returns once the router's Status meets the condition."""
    async with asyncio.timeout(5):
        while not condition(await house.status()):
            await asyncio.sleep(0.01)


@asynccontextmanager
async def open_house_around(outer: AsyncExitStack, config: TandemConfig) -> AsyncIterator[House]:
    """The router closes first; client and workers stay until the outer stack ends."""
    async with open_router(config) as address:
        channel = await outer.enter_async_context(rpc.make_channel(address))
        yield House(address, channel, outer)
