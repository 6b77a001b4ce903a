"""The prefill service alone: a context that takes what it tells, and a transport that notes what is asked of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from kv_transfer.base import Counters, Sender, Source, TransferSummary, TransferTarget
from prefill_worker.service import PrefillService
from tandem import wire
from tandem.config import parse_config
from tandem.types import EngineRequest, Role, SamplingParams
from tandem.v1 import worker_pb2
from tandem.worker.engine_thread import EngineThread
from tandem.worker.host import WorkerHost

CONFIG = parse_config({"engine": {"kv_memory_mib": 4, "threads": 1, "max_step_tokens": 8}})


class NotingTransport:
    name = "grpc"

    def __init__(self) -> None:
        self.counters = Counters()
        self.calls: list[str] = []

    @asynccontextmanager
    async def open(self, source: Source, target: TransferTarget) -> AsyncIterator[Sender]:
        self.calls.append("open")
        yield self

    async def send(self, layers: range, tokens: range) -> None:
        if tokens:
            self.calls.append("send")

    async def seal(self, first_token: int, prefilled_s: float | None = None) -> TransferSummary:
        self.calls.append("seal")
        return TransferSummary(0, 0, 0.0)

    async def abandon(self) -> None:
        self.calls.append("abandon")

    async def aclose(self) -> None:
        pass


class Context:
    def __init__(self) -> None:
        self.told: list[worker_pb2.PrefillEvent] = []
        self.metadata: dict[str, str] = {}

    def time_remaining(self) -> float:
        return 60.0

    async def send_initial_metadata(self, metadata: tuple[tuple[str, str], ...]) -> None:
        assert not self.told, "it is sent with the first event at the latest"
        self.metadata = dict(metadata)

    async def write(self, event: worker_pb2.PrefillEvent) -> None:
        self.told.append(event)


class Prefill:
    """One worker, asked directly."""

    def __init__(self) -> None:
        self.thread = EngineThread(CONFIG)
        self.host = WorkerHost(CONFIG, self.thread, frozenset({Role.PREFILL}))
        self.transport = NotingTransport()
        self.service = PrefillService(self.host)
        self.service.transports = {"grpc": self.transport}
        self.thread.start()

    async def ask(self, **sampling: Any) -> list[worker_pb2.PrefillEvent]:
        request = EngineRequest("r", tuple(range(3, 43)), SamplingParams(**sampling))
        context = Context()
        message = worker_pb2.PrefillRequest(
            request=wire.request_to_wire(request),
            target=worker_pb2.TransferTarget(reservation_id="secret", address="nowhere", transport="grpc"),
            fingerprint=wire.fingerprint_to_wire(self.host.engine.fingerprint),
        )
        await self.service.Prefill(message, context)
        assert context.metadata == {"tandem-counted-from": str(self.host.next_heartbeat)}
        await self.thread.call(lambda: None)  # what was posted before is done
        assert self.host.engine.pool.num_free == self.host.engine.pool.num_blocks
        assert not self.host.busy
        return context.told


@pytest.fixture
async def prefill() -> AsyncIterator[Prefill]:
    prefill = Prefill()
    yield prefill
    prefill.thread.stop()


async def test_what_is_decoded_elsewhere_is_sent_and_sealed(prefill: Prefill) -> None:
    told = await prefill.ask(max_tokens=2, ignore_eos=True)
    assert [event.WhichOneof("event") for event in told] == ["started", "first_token", "sealed"]
    assert prefill.transport.calls == ["open", *["send"] * 5, "seal"]


async def test_a_single_token_opens_no_transfer(prefill: Prefill) -> None:
    told = await prefill.ask(max_tokens=1)
    assert [event.WhichOneof("event") for event in told] == ["started", "first_token"]
    assert told[-1].first_token.finish_reason
    assert prefill.transport.calls == []


async def test_a_first_token_that_ends_the_request_abandons_its_transfer(prefill: Prefill) -> None:
    first = (await prefill.ask(max_tokens=1))[-1].first_token.token.id
    told = await prefill.ask(max_tokens=5, stop_token_ids=(first,))
    assert told[-1].first_token.finish_reason
    assert "seal" not in prefill.transport.calls
    assert prefill.transport.calls[-1] == "abandon"
