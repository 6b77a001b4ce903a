"""A carrier as a stranger would add it: nothing of it stands outside of this file, and it keeps every promise."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from itertools import count
from typing import Any

import pytest
from kv_rig import MakeRig, push_rig
from test_kv_transfer_contract import *  # noqa: F403  the promises; the fixture below says whose they are

from kv_transfer.ends.carrier import Carrier
from kv_transfer.ends.link import Call, CarrierLink
from kv_transfer.ends.receiver import Intake
from kv_transfer.frames.codec import encode
from kv_transfer.frames.messages import Count, Data, message
from kv_transfer.frames.runs import Runs
from tandem.errors import TransferFailed
from tandem.v1 import registry_pb2

SLOTS: dict[int, bytes] = {}  # payloads on their way, both ends are in one process
FREE, WINDOW = count(), 4


@message("slotted")
class Slotted(Data):
    slot: Count


class MemoryCarrier(Carrier):
    name, method = "memory", "PushSlotted"

    def announcement(self) -> registry_pb2.Transport:
        return registry_pb2.Transport(name=self.name, domain="this process", rank=40)

    def link(self, call: Call) -> CarrierLink:
        return MemoryLink(call)

    def intake(self, context: Any) -> Intake:
        return MemoryIntake()


class MemoryLink(CarrierLink):
    slots: frozenset[int] = frozenset()

    def pack(self, sequence: int, layers: range, tokens: range, payload: Runs) -> tuple[Data, bytes]:
        whole, crc = payload.gathered()
        return Data.of_ranges(sequence, layers, tokens, len(whole), crc), whole

    async def carry(self, data: Data, packed: bytes) -> None:
        while len(self.slots & SLOTS.keys()) >= WINDOW and not self._answer.done():
            await asyncio.sleep(0.001)
        SLOTS[slot := next(FREE)] = packed
        self.slots |= {slot}
        await self.write(encode(Slotted(**asdict(data), slot=slot)))

    def close(self) -> None:
        super().close()
        for slot in self.slots & SLOTS.keys():
            del SLOTS[slot]


class MemoryIntake(Intake):
    kind = Slotted

    async def fetch(self, data: Data, payload: memoryview) -> memoryview:
        assert isinstance(data, Slotted)
        if len(SLOTS.get(data.slot, b"")) != data.payload_bytes:
            raise TransferFailed("the payload is not where the sender says")
        return memoryview(SLOTS.pop(data.slot))


@pytest.fixture
def make_rig() -> MakeRig:
    return lambda fingerprint, config: push_rig(fingerprint, config, *(MemoryCarrier(config.worker) for _ in range(2)))
