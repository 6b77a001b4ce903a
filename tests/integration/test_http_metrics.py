"""What workers count reaches /metrics: for each transport, each end and each worker."""

from __future__ import annotations

import asyncio

from http_house import HttpHouse, http_configuration, open_http_house

from tandem.v1 import registry_pb2

# Each field has a number that no other has.
GRPC = registry_pb2.KVTraffic(
    transfers=11, failures=12, bytes=13, frames=14, seconds=1.5, hidden_seconds=0.5, corrupt_frames=15
)
RAY = registry_pb2.KVTraffic(
    transfers=21, failures=22, bytes=23, frames=24, seconds=2.5, hidden_seconds=0.75, corrupt_frames=25
)


async def lines_of(door: HttpHouse) -> list[str]:
    return (await door.client.get("/metrics")).text.splitlines()


async def test_kv_counters_by_worker_end_and_transport() -> None:
    async with open_http_house(http_configuration()) as door:
        prefill, decode = await door.house.pair()
        prefill.load = registry_pb2.Load(kv_sent={"grpc": GRPC, "ray": RAY})
        decode.load = registry_pb2.Load(kv_received={"grpc": GRPC}, quarantined_blocks=31, out_of_memory=32)
        await eventually_line(door, 'tandem_worker_kv_blocks_quarantined{roles="decode",worker="d1"} 31.0')
        await eventually_line(door, 'tandem_worker_kv_bytes_total{direction="sent",transport="ray",worker="p1"} 23.0')
        lines = await lines_of(door)
        assert 'tandem_worker_out_of_memory_total{roles="decode",worker="d1"} 32.0' in lines
        for worker, direction, transport, traffic in (
            ("p1", "sent", "grpc", GRPC),
            ("p1", "sent", "ray", RAY),
            ("d1", "received", "grpc", GRPC),
        ):
            labels = f'{{direction="{direction}",transport="{transport}",worker="{worker}"}}'
            for field in registry_pb2.KVTraffic.DESCRIPTOR.fields_by_name:
                assert f"tandem_worker_kv_{field}_total{labels} {float(getattr(traffic, field))}" in lines
        assert 'tandem_worker_kv_blocks_quarantined{roles="prefill",worker="p1"} 0.0' in lines


async def eventually_line(door: HttpHouse, line: str) -> None:
    async with asyncio.timeout(5):
        while line not in await lines_of(door):
            await asyncio.sleep(0.01)
