"""One end of a KV transfer in a process of its own, to be killed or not; ends never.

    kv_peer.py send ADDRESS [--deadline S] [--whole | --lose | --wait-in copy|lock|write] [BY]
    kv_peer.py receive [BY]

By gRPC, or as BY says: --ray CLUSTER, through its object store; --shm, through shared memory; --nixl. Says one line on
stdout: the sender "half" in mid-transfer, or "whole" after it, "lost: ..." and the error when it drops each object
before it can be read; the receiver its port. With --wait-in the sender says "waiting" in the midst of its first copy,
before it takes the lock, or (by NIXL) after its first write, which it then does again; it goes on when it reads a line,
and says "failed: ..." when its transfer has.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from kv_reservations import FakeReservations
from kv_rig import FINGERPRINT, Rig, config_with, serving
from ray_head import joined

import kv_transfer.frames.wire_dtype
from kv_transfer.carriers.grpc.carrier import GrpcCarrier
from kv_transfer.carriers.nixl.agent import Agent, Write
from kv_transfer.carriers.nixl.carrier import NixlCarrier
from kv_transfer.carriers.ray.carrier import RayCarrier
from kv_transfer.carriers.ray.plasma import Place, Plasma, connect
from kv_transfer.carriers.shm.carrier import ShmCarrier
from kv_transfer.carriers.shm.memory import PeerMemory, SharedMemory
from kv_transfer.ends.carrier import Carrier
from kv_transfer.ends.transport import PushTransport
from kv_transfer.frames.cells import Cells
from kv_transfer.frames.runs import Runs
from tandem.errors import TandemError


def carrier(shm: bool = False, nixl: bool = False, memory: SharedMemory | None = None) -> Carrier:
    """memory: of a receiver's pool."""
    if shm:
        return ShmCarrier(config_with().worker, memory or SharedMemory())
    if nixl:
        return NixlCarrier(config_with(nixl_devices="lo").worker, "cpu")
    plasma = connect()
    return GrpcCarrier(config_with().worker) if plasma is None else RayCarrier(config_with().worker, plasma)


async def send(address: str, deadline_s: float | None, whole: bool, carrier: Carrier) -> None:
    rig = Rig(FINGERPRINT, PushTransport(carrier), address, shared_pool=False)
    job = rig.job()
    if whole:
        await rig.transfer(job)
        print("whole", flush=True)
        await asyncio.Event().wait()
    async with rig.transport.open(job.source, replace(job.target, deadline_s=deadline_s)) as sender:
        await sender.send(rig.layers, range(10))
        print("half", flush=True)
        await asyncio.Event().wait()


async def lose(address: str) -> None:
    put = Plasma.put

    def forgetful(self: Plasma, payload: bytes) -> tuple[object, Place]:
        return None, put(self, payload)[1]

    Plasma.put = forgetful  # type: ignore[method-assign]
    rig = Rig(FINGERPRINT, PushTransport(carrier()), address, shared_pool=False)
    try:
        await rig.transfer(rig.job())
    except TandemError as error:
        print(f"lost: {type(error).__name__}: {error}", flush=True)
    await asyncio.Event().wait()


async def wait_in(address: str, where: str) -> None:
    copy, lock, begin = Cells.copy_from, PeerMemory.lock, Agent.write
    first = threading.Semaphore()

    def wait() -> None:
        if first.acquire(blocking=False):  # the other copy thread goes on
            print("waiting", flush=True)
            sys.stdin.readline()

    def copy_slowly(self: Cells, payload: Runs) -> int:
        """Everything twice: what comes second is a late write."""
        copy(self, payload)
        wait()
        return copy(self, payload)

    def lock_late(self: PeerMemory, key: int) -> None:
        wait()
        lock(self, key)

    def write_twice(self: Agent, *rest: Any) -> Write:
        """What comes second is a late write."""
        write = begin(self, *rest)
        while not write.ended():
            pass
        wait()
        return begin(self, *rest)

    kv_transfer.frames.cells.QUICK_BYTES = 0  # threads wait, not the event loop
    if where == "copy":
        Cells.copy_from = copy_slowly  # type: ignore[method-assign]
    elif where == "lock":
        PeerMemory.lock = lock_late  # type: ignore[method-assign]
    else:
        Agent.write = write_twice  # type: ignore[method-assign]
    sender = PushTransport(carrier(shm=where != "write", nixl=where == "write"))
    rig = Rig(FINGERPRINT, sender, address, shared_pool=False)
    try:
        await rig.transfer(rig.job())
    except TandemError as error:
        print(f"failed: {error}", flush=True)
    await asyncio.Event().wait()


async def receive(shm: bool, nixl: bool) -> None:
    reservations, memory = FakeReservations(FINGERPRINT), SharedMemory() if shm else None
    async with serving(reservations, config_with(), [carrier(shm, nixl, memory)]) as (_, port, _):
        sender = PushTransport(GrpcCarrier(config_with().worker))
        rig = Rig(FINGERPRINT, sender, "", shared_pool=False, memory=memory)
        rig.job()
        reservations.by_id.update(rig.reservations.by_id)
        print(port, flush=True)
        await asyncio.Event().wait()


@asynccontextmanager
async def peer(*arguments: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """The process and the line it said."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        __file__,
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        env={"PYTHONPATH": str(Path(__file__).parents[2]), **_ray_token()},
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(60):
            yield process, (await process.stdout.readline()).decode().strip()
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def _ray_token() -> dict[str, str]:
    """Of the cluster that this process is part of."""
    return {key: value for key, value in os.environ.items() if key.startswith("RAY_AUTH_")}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("end", choices=["send", "receive"])
    parser.add_argument("address", nargs="?", default="")
    parser.add_argument("--deadline", type=float)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--lose", action="store_true")
    parser.add_argument("--wait-in", choices=["copy", "lock", "write"])
    parser.add_argument("--ray")
    parser.add_argument("--shm", action="store_true")
    parser.add_argument("--nixl", action="store_true")
    given = parser.parse_args()
    with ExitStack() as stack:
        if given.ray:
            stack.enter_context(joined(given.ray, os.environ["RAY_AUTH_TOKEN"]))
        if given.end == "receive":
            asyncio.run(receive(given.shm, given.nixl))
        elif given.wait_in:
            asyncio.run(wait_in(given.address, given.wait_in))
        elif given.lose:
            asyncio.run(lose(given.address))
        else:
            asyncio.run(send(given.address, given.deadline, given.whole, carrier(given.shm, given.nixl)))


if __name__ == "__main__":
    main()
