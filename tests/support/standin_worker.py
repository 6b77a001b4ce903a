"""`python -m standin_worker worker --role R --router HOST:PORT --config FILE ...`: joins, and that is all.

`model.name` in the configuration says how it misbehaves:

    refuse        says why and exits with 2, as for a wrong configuration
    crash         says why and exits with 3
    crash-later   exits with 2 from when there is a file `mark` in the folder model.path
    refuse-one    the first one (it leaves that mark) says why and exits with 2
    never-join    runs, but does not join
    deaf          ignores SIGTERM
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

from tandem import rpc, wire
from tandem.config import TandemConfig, load_config
from tandem.types import Role
from tandem.v1 import registry_pb2, registry_pb2_grpc


def argument(name: str) -> str:
    return sys.argv[sys.argv.index(name) + 1]


def exit_now(config: TandemConfig) -> int | None:
    match config.model.name:
        case "refuse":
            print("error: config key engine.device: no such device", flush=True)
            return 2
        case "crash":
            print("out of luck", flush=True)
            return 3
        case "crash-later" if (Path(config.model.path) / "mark").exists():
            print("error: the model is gone", flush=True)
            return 2
        case "refuse-one":
            with suppress(FileExistsError):
                (Path(config.model.path) / "mark").touch(exist_ok=False)
                print("error: no memory here", flush=True)
                return 2
    return None


async def join(router: str) -> None:
    """Joined for as long as the router answers; then tries again."""
    role = argument("--role")
    roles = wire.roles_to_wire(Role if role == "both" else {Role(role)})
    hello = registry_pb2.Hello(worker_id=str(os.getpid()), pid=os.getpid(), roles=roles)
    async with rpc.make_channel(router) as channel:
        stub = registry_pb2_grpc.RegistryStub(channel)
        while True:
            call = stub.Join(wait_for_ready=True)
            try:
                await call.write(registry_pb2.Heartbeat(hello=hello))
                while await call.read():
                    pass
            except rpc.grpc.RpcError:
                await asyncio.sleep(0.05)


async def main(config: TandemConfig) -> None:
    print("args", *sys.argv[1:], flush=True)
    print("config", config.serve.model_dump_json(), flush=True)
    print("gpu", os.environ.get("CUDA_VISIBLE_DEVICES"), list(config.engine.devices), flush=True)
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    if config.model.name == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        loop.add_signal_handler(signal.SIGTERM, task.cancel)
    if config.model.name == "never-join":
        await asyncio.Event().wait()
    await join(argument("--router"))


if __name__ == "__main__":
    settings = load_config(Path(argument("--config")))
    code = exit_now(settings)
    if code is not None:
        sys.exit(code)
    try:
        asyncio.run(main(settings))
    except asyncio.CancelledError:
        sys.exit(0)
