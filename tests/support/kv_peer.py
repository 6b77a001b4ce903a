"""One end of a gRPC KV transfer in a process to be killed: `kv_peer.py send ADDRESS [DEADLINE_S]` or `receive`.

Says one line on stdout when it stands in mid-transfer (send: "half") or listens (receive: its port); ends never.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from kv_rig import FINGERPRINT, FakeLandings, Rig, config_with, serving

from kv_transfer.grpc_transport import GrpcTransport


async def send(address: str, deadline_s: float | None) -> None:
    rig = Rig(FINGERPRINT, GrpcTransport(config_with()), address, shared_pool=False)
    job = rig.job()
    async with rig.transport.open(job.source, replace(job.target, deadline_s=deadline_s)) as sender:
        await sender.send(range(10))
        print("half", flush=True)
        await asyncio.Event().wait()


async def receive() -> None:
    landings = FakeLandings(FINGERPRINT)
    async with serving(landings, config_with()) as (_, port, _):
        rig = Rig(FINGERPRINT, GrpcTransport(config_with()), "", shared_pool=False)
        rig.job()
        landings.by_id.update(rig.landings.by_id)
        print(port, flush=True)
        await asyncio.Event().wait()


@asynccontextmanager
async def peer(*arguments: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """The process and the line it said."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        __file__,
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        env={"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(60):
            yield process, (await process.stdout.readline()).decode().strip()
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


if __name__ == "__main__":
    if sys.argv[1] == "send":
        asyncio.run(send(sys.argv[2], float(sys.argv[3]) if len(sys.argv) > 3 else None))
    else:
        asyncio.run(receive())
