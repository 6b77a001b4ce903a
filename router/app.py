"""Puts the router together and runs it until it is told to stop."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext

from router.doors.grpc.admin import RouterAdminService
from router.doors.grpc.generation import GenerationService
from router.doors.grpc.status import StatusReport
from router.life.admission import RequestAdmission
from router.life.request import Orchestrator
from router.pool.join import JoinService
from router.pool.registry import Registry
from router.tokenizer import Tokenizer
from tandem import rpc
from tandem.addresses import check_listening, join_address, loopback_beside
from tandem.config import TandemConfig
from tandem.errors import ConfigError, ModelRefused
from tandem.process import descriptors
from tandem.process.entry import on_stop_signals
from tandem.tokenizer import load_tokenizer
from tandem.v1 import generation_pb2, generation_pb2_grpc, registry_pb2, registry_pb2_grpc

log = logging.getLogger(__name__)

# Calls that wait for the event loop, as many as gRPC lets wait by itself.
LEAST_UNTAKEN = 1000
_SERVICES = tuple(
    service.full_name
    for file in (generation_pb2.DESCRIPTOR, registry_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
)
# A router that has drained waits this long for calls that do not end by themselves: joined workers, health watchers.
HANG_UP_S = 0.5


def run(config: TandemConfig) -> int:
    """The exit code: 0 after a signal, 2 when the configuration is wrong, the port is taken or the model refused."""
    try:
        asyncio.run(_serve_until_signal(config))
    except (ConfigError, ModelRefused) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


async def _serve_until_signal(config: TandemConfig) -> None:
    stop, hurry = asyncio.Event(), asyncio.Event()
    on_stop_signals(stop.set, hurry.set)
    await serve(config, stop, _on_ready, hurry)


def _on_ready(address: str) -> None:
    # To look through what stays until the end for garbage stops the event loop for 50 ms.
    gc.freeze()
    print(f"ready {address}", flush=True)


async def serve(
    config: TandemConfig, stop: asyncio.Event, ready: Callable[[str], None], hurry: asyncio.Event | None = None
) -> None:
    """Serves until `stop` is set, then drains until `hurry` is. ready gets host:port once the router answers.

    Raises ConfigError or ModelRefused.
    """
    async with open_router(config, hurry) as address:
        ready(address)
        await stop.wait()
        log.info("stopping: no new requests; live ones have %g s", config.router.drain_timeout_s)


@asynccontextmanager
async def open_router(config: TandemConfig, hurry: asyncio.Event | None = None) -> AsyncIterator[str]:
    """A serving router; yields its host:port, and drains on the way out unless `hurry` is set.

    Raises ConfigError, or ModelRefused for a tokenizer that would not be served exactly.
    """
    descriptors.raise_limit()
    descriptors.tell_exhaustion_rarely(asyncio.get_running_loop())
    host, loopback = config.router.host, loopback_beside(config.router.host)
    check_listening("router", host, config.router.port)  # before a tokenizer is fetched
    registry = Registry(config.router, config.model.served_name)
    loaded = load_tokenizer(config.model)
    if loaded is None:
        log.warning("no tokenizer in %s: prompts must be token ids, and answers carry no text", config.model.path)
    tokenizer = None if loaded is None else Tokenizer(loaded)
    admission = RequestAdmission(tokenizer, registry.served, config.router.max_message_bytes)
    orchestrator = Orchestrator(config.router, registry, admission)
    hosts = [host] if loopback is None else [host, loopback]
    async with _http_door(config, hosts, orchestrator, registry, admission) as http_port:
        # Strangers fill it: room for as many as are served at once. With more, all would wait until it is too late.
        untaken = max(LEAST_UNTAKEN, config.router.max_live_requests)
        server = rpc.make_server(config.router.max_message_bytes, untaken)
        generation = GenerationService(orchestrator, StatusReport(orchestrator, registry, http_port))
        generation_pb2_grpc.add_GenerationServicer_to_server(generation, server)
        registry_pb2_grpc.add_RegistryServicer_to_server(JoinService(registry, config.router), server)
        registry_pb2_grpc.add_RouterAdminServicer_to_server(RouterAdminService(registry), server)
        health_service = await rpc.add_health(server, _SERVICES)
        port = config.router.port
        for each in hosts:
            port = rpc.bind(server, each, port)
        await server.start()
        watch = asyncio.create_task(descriptors.watch_connections(port, "the router's gRPC port"))
        try:
            yield join_address(host, port)
        finally:
            watch.cancel()
            await health_service.enter_graceful_shutdown()
            await orchestrator.close(config.router.drain_timeout_s, hurry or asyncio.Event())
            registry.close()
            await server.stop(HANG_UP_S)


def _http_door(
    config: TandemConfig, hosts: list[str], orchestrator: Orchestrator, registry: Registry, admission: RequestAdmission
) -> AbstractAsyncContextManager[int]:
    """Yields its port; 0 when there is none. Raises ConfigError."""
    if config.router.http_port < 0:
        return nullcontext(0)
    try:
        from router.doors.http.door import open_door
    except ModuleNotFoundError as error:
        words = (
            f"the HTTP door needs {error.name}: pip install -c constraints.txt -e '.[http]' in a checkout, "
            "or say router.http_port: -1 (no such door)"
        )
        raise ConfigError(words, field="router.http_port") from None
    return open_door(config, hosts, orchestrator, registry, admission.tokenizer)
