"""`python -m standin_router --config FILE`: just enough of a router for the supervisor's tests.

It listens, says so, and lists the workers that have joined. No tokens, and no HTTP door: it only says where one would
be, at a port of its own when any free one is asked for.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

from tandem import rpc
from tandem.config import load_config
from tandem.v1 import generation_pb2, generation_pb2_grpc, registry_pb2, registry_pb2_grpc


class StandinRouter(generation_pb2_grpc.GenerationServicer, registry_pb2_grpc.RegistryServicer):
    def __init__(self, http_port: int) -> None:
        self._http_port = http_port or 1024 + os.getpid() % 60_000
        self._workers: dict[int, registry_pb2.Hello] = {}

    async def Join(self, requests: Any, context: Any) -> None:
        first = await context.read()
        self._workers[first.hello.pid] = first.hello
        try:
            await context.write(registry_pb2.Directive(welcome=registry_pb2.Welcome(heartbeat_interval_ms=1000)))
            await context.read()  # until the worker is gone
        finally:
            del self._workers[first.hello.pid]

    async def Status(self, request: Any, context: Any) -> generation_pb2.StatusResponse:
        workers = [generation_pb2.WorkerStatus(hello=hello) for hello in self._workers.values()]
        return generation_pb2.StatusResponse(workers=workers, http_port=self._http_port)


async def main(config_path: str) -> None:
    config = load_config(Path(config_path))
    server, router, stop = rpc.make_server(), StandinRouter(config.router.http_port), asyncio.Event()
    generation_pb2_grpc.add_GenerationServicer_to_server(router, server)
    registry_pb2_grpc.add_RegistryServicer_to_server(router, server)
    port = rpc.bind(server, "127.0.0.1", config.router.port)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await server.start()
    print(f"ready 127.0.0.1:{port}", flush=True)
    await stop.wait()
    await server.stop(0)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[sys.argv.index("--config") + 1]))
