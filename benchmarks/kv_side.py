"""One end of the transfers of kv_transfer.py, or the Ray cluster under them; a process of its own.

    kv_side.py head FOLDER BYTES RESOURCES        says the cluster's address, lives until its stdin ends
    kv_side.py receive CONFIG CLUSTER             says its port, likewise
    kv_side.py send CONFIG CLUSTER PORT           answers {"transport": ..., "tokens": ...} with {"seconds": ...}

Payloads have no checksum where KV_SIDE_UNCHECKED is set.
CLUSTER: empty for a process outside Ray. CONFIG: settings of Tandem, JSON. RESOURCES: custom ones of the node, JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from kv_transfer.base import Source, TransferSummary, TransferTarget, Transport
from kv_transfer.carriers.table import make_carriers
from kv_transfer.ends.carrier import PoolMemory
from kv_transfer.ends.link import MAX_MESSAGE_BYTES
from kv_transfer.ends.service import KVService
from kv_transfer.ends.transport import PushTransport
from kv_transfer.frames.layout import KVLayout
from kv_transfer.frames.runs import Runs
from tandem.config import TandemConfig, parse_config
from tandem.engine.backends.backend import Allocate, backend_for, tune_process
from tandem.engine.backends.cpu.memory import use_huge_pages
from tandem.engine.kv_cache import KVCache
from tandem.errors import TandemError
from tandem.rpc import bind, make_server
from tandem.types import Fingerprint

# The 160M shape in float32: 72 KiB a token.
FINGERPRINT = Fingerprint("c", "w", "float32", 16, 12, 12, 64, 1)
MAX_TOKENS = 2048
# What one step of a prefill makes final.
CHUNK = 512


def say(**fact: object) -> None:
    print(json.dumps(fact), flush=True)


def pool(allocate: Allocate | None = None) -> Tensor:
    """As the engine of a worker has it."""
    memory = KVCache(FINGERPRINT, MAX_TOKENS // FINGERPRINT.block_size, backend_for("cpu"), allocate).pool.uniform_()
    use_huge_pages()
    return memory


class IncomingTransfer:
    local = False
    cached_tokens = attempt = 0

    def __init__(self, memory: Tensor, blocks: Sequence[int], request_id: str) -> None:
        self.pool, self.blocks, self.request_id = memory, blocks, request_id
        self.prompt_tokens = int(request_id.split("-")[1])

    def claim(self) -> None: ...

    @contextmanager
    def writing(self) -> Iterator[None]:
        yield

    def touch(self) -> None: ...

    def when_over(self, tell: Callable[[TandemError], None]) -> None: ...

    async def sealed(self, first_token: int, summary: TransferSummary) -> None: ...

    def abandoned(self) -> None: ...

    def failed(self, error: TandemError) -> None:
        print(f"a transfer failed: {error}", file=sys.stderr)


class IncomingTransfers:
    fingerprint = FINGERPRINT

    def __init__(self, memory: PoolMemory) -> None:
        self._pool = pool(memory.allocate)
        self._blocks = tuple(torch.randperm(self._pool.shape[2]).tolist())

    def find(self, reservation_id: str) -> IncomingTransfer:
        return IncomingTransfer(self._pool, self._blocks, reservation_id)


async def receive(config: TandemConfig) -> None:
    memory = PoolMemory("cpu")
    carriers = make_carriers(config, memory)
    service = KVService(IncomingTransfers(memory), config, carriers)
    server = make_server(MAX_MESSAGE_BYTES)
    server.add_generic_rpc_handlers((service,))
    port = bind(server, "127.0.0.1", 0)
    await server.start()
    say(port=port)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(None)
    await service.aclose()


async def send(config: TandemConfig, port: int) -> None:
    carriers = make_carriers(config, PoolMemory("cpu", receives=False))
    transports = {carrier.name: PushTransport(carrier) for carrier in carriers}
    memory = pool()
    source = Source(memory, tuple(torch.randperm(memory.shape[2]).tolist()), KVLayout.of(FINGERPRINT))
    say(ready=True)
    number = 0
    while line := await asyncio.to_thread(sys.stdin.readline):
        case, number = json.loads(line), number + 1
        name = f"{number}-{case['tokens']}"
        target = TransferTarget(name, name, 0, f"127.0.0.1:{port}", 0, case["tokens"], FINGERPRINT)
        say(seconds=await transfer(transports[case["transport"]], source, target))
    for transport in transports.values():
        await transport.aclose()


async def transfer(transport: Transport, source: Source, target: TransferTarget) -> float:
    """Seconds from the opening to the seal's acknowledgement."""
    started = asyncio.get_running_loop().time()
    async with transport.open(source, target) as sender:
        for start in range(0, target.prompt_tokens, CHUNK):
            await sender.send(range(source.layout.num_layers), range(start, min(start + CHUNK, target.prompt_tokens)))
        await sender.seal(1)
    return asyncio.get_running_loop().time() - started


@contextmanager
def in_ray(**arguments: object) -> Iterator[str]:
    import ray

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        context = ray.init(log_to_driver=False, logging_level="ERROR", **arguments)
    try:
        yield str(context.address_info["gcs_address"])
    finally:
        ray.shutdown()


def leave_payloads_unchecked() -> None:
    """Both ends say 0 of every payload."""
    copy = Runs.copy_to

    def unchecked(payload: Runs, target: Runs, checked: bool = False, streamed: bool = False) -> int:
        return copy(payload, target, streamed=streamed)

    Runs.checksum = lambda payload: 0  # type: ignore[method-assign]
    Runs.copy_to = unchecked  # type: ignore[method-assign]


def main() -> None:
    if os.environ.get("KV_SIDE_UNCHECKED"):
        leave_payloads_unchecked()
    end, *rest = sys.argv[1:]
    if end == "head":
        node = {"object_store_memory": int(rest[1]), "_temp_dir": rest[0], "resources": json.loads(rest[2])}
        with in_ray(include_dashboard=False, num_cpus=0, **node) as address:
            say(address=address)
            sys.stdin.read()
        return
    config = parse_config(json.loads(rest[0]))
    tune_process(config.engine)
    with in_ray(address=rest[1]) if rest[1] else contextlib.nullcontext():
        asyncio.run(receive(config) if end == "receive" else send(config, int(rest[2])))


if __name__ == "__main__":
    main()
