"""The decode service as the event loop sees it: what takes long happens elsewhere, and once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest

import tandem.engine.sequence
import tandem.worker.host
from decode_worker.service import DecodeService
from kv_transfer.base import TransferSummary
from kv_transfer.carriers.grpc.carrier import GrpcCarrier
from tandem import wire
from tandem.config import parse_config
from tandem.prefix import chain_hashes
from tandem.types import EngineRequest, Role, SamplingParams
from tandem.v1 import worker_pb2
from tandem.worker.engine_thread import EngineThread
from tandem.worker.host import WorkerHost

CONFIG = parse_config({"engine": {"kv_memory_mib": 4, "threads": 1}})
REQUEST = EngineRequest("r", tuple(range(3, 103)), SamplingParams(max_tokens=40, ignore_eos=True))


class Context:
    """A call that nobody cancels."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.written: asyncio.Queue[worker_pb2.TokenBatch] = asyncio.Queue()

    def cancelled(self) -> bool:
        return False

    async def send_initial_metadata(self, metadata: tuple[tuple[str, str], ...]) -> None:
        self.begun.set()

    async def write(self, batch: worker_pb2.TokenBatch) -> None:
        self.written.put_nowait(batch)


async def test_a_long_prompt_is_named_once_and_not_in_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law 6: 100 000 tokens take milliseconds, in which every other request would stand still."""
    named: list[tuple[str, int]] = []

    def noted(parent: bytes | None, tokens: Sequence[int], *others: Any) -> list[bytes]:
        named.append((threading.current_thread().name, len(tokens)))
        return chain_hashes(parent, tokens, *others)

    monkeypatch.setattr(tandem.engine.sequence, "chain_hashes", noted)
    monkeypatch.setattr(tandem.worker.host, "LONG_PROMPT_TOKENS", 100)
    thread = EngineThread(CONFIG)
    host = WorkerHost(CONFIG, thread, frozenset({Role.DECODE}), [GrpcCarrier(CONFIG.worker)])
    service, tokens = DecodeService(host), Context()
    subscribed = asyncio.create_task(service.Subscribe(worker_pb2.SubscribeRequest(subscriber_id="router"), tokens))
    await tokens.begun.wait()
    reserve = worker_pb2.ReserveRequest(
        request=wire.request_to_wire(REQUEST), subscriber_id="router", lease_ms=60_000, transport="grpc"
    )
    reservation = await service.Reserve(reserve, Context())
    thread.start()
    incoming = host.reservations.find(reservation.reservation_id)
    incoming.claim()
    await incoming.sealed(5, TransferSummary(0, 0, 0.0))
    while not (await tokens.written.get()).requests[-1].finish_reason:
        pass
    service.close_streams()
    await subscribed
    thread.stop()
    await service.aclose()
    prompts = [name for name, tokens in named if tokens >= 100]
    assert len(prompts) == 1
    assert prompts[0] not in ("MainThread", "engine")
    assert sum(tokens for _, tokens in named) < 2 * 140, "blocks of output are named as they fill"
