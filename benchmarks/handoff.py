"""What the handoff of a prompt costs, end to end: the gap before decoding, and how much of the transfer prefill hid.

usage: python benchmarks/handoff.py [--shape 160m] [--prompts 512 2048] [--transports grpc shm nixl ray] [--rounds 9]
                                    [--output FILE]

For each transport a service of its own: a router, a prefill worker and a decode worker, each worker on its own core;
for ray on a Ray cluster, where workers have a thread each but no core of their own. nixl goes over the loopback device.
One request at a time, so that nothing queues; services and prompt lengths take turns, round by round; medians.
Transports whose library is not installed are left out.

    gap      from the first token, sampled by prefill, to the end of decode's first step
    hidden   of the seconds in which the sender worked on the transfer, the share before the first token
    step     between two later tokens of the same answer
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import statistics
import subprocess
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
import record
from optional import installed
from rich.console import Console
from rich.table import Table
from shapes import SHAPES, write_model
from side import RayCluster, ray_cluster

from tandem.client import AsyncClient
from tandem.config import parse_config
from tandem.launch.processes import Supervisor
from tandem.timeline import Phase
from tandem.types import ChoiceFinished, RequestReport, SamplingParams

OUTPUT_TOKENS = 10
TRANSPORTS = ("grpc", "shm", "nixl", "ray")
START_S = 240


class Service:
    def __init__(self, name: str, client: AsyncClient, vocab_size: int) -> None:
        self.name = name
        self._client = client
        self._random = np.random.default_rng(0)
        self._vocab_size = vocab_size

    async def ask(self, tokens: int) -> dict[str, float]:
        """Milliseconds and bytes of one request of its own."""
        prompt = self._random.integers(3, self._vocab_size, tokens).tolist()
        sampling = SamplingParams(max_tokens=OUTPUT_TOKENS, ignore_eos=True)
        async for event in self._client.generate(prompt, sampling=sampling):
            if isinstance(event, ChoiceFinished):
                return _figures(event.report)
        raise SystemExit("an answer did not end")


def _figures(report: RequestReport) -> dict[str, float]:
    marks = report.timeline.marks
    first, decoding, finished = (marks[phase] for phase in (Phase.FIRST_TOKEN, Phase.DECODE_STARTED, Phase.FINISHED))
    return {
        "prefill_ms": first - marks[Phase.PREFILL_STARTED],
        "gap_ms": decoding - first,
        "step_ms": (finished - decoding) / (OUTPUT_TOKENS - 2),
        "transfer_ms": report.kv_transfer_ms,
        "hidden_ms": report.kv_hidden_ms,
        "kv_mib": report.kv_bytes / (1 << 20),
    }


async def _start(stack: AsyncExitStack, transport: str, model: Path, vocab_size: int) -> Service:
    settings = {
        "model": {"path": str(model), "load_format": "dummy"},
        "router": {"port": 0, "http_port": -1, "transport": transport},
        "worker": {"nixl_devices": "lo"} if transport == "nixl" else {},
        "serve": {"prefill": 1, "decode": 1},
    }
    start = _on_ray if transport == "ray" else _on_this_machine
    client = await stack.enter_async_context(AsyncClient(await start(stack, settings)))
    return Service(transport, client, vocab_size)


async def _on_this_machine(stack: AsyncExitStack, settings: dict[str, Any]) -> str:
    """The router's address."""
    supervisor = Supervisor(parse_config(settings), output=None)
    await supervisor.start()
    stack.push_async_callback(supervisor.stop)
    return supervisor.address


async def _on_ray(stack: AsyncExitStack, settings: dict[str, Any]) -> str:
    """As above, of a service on a cluster that ends with the stack."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        settings["router"]["port"] = free.getsockname()[1]
    file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "service.json"
    file.write_text(json.dumps(settings))
    cluster = stack.enter_context(ray_cluster({}, prefill=1, decode=1))
    await asyncio.to_thread(_tandem, cluster, "serve", "--ray", "--config", str(file), "--wait", str(START_S))
    stack.callback(_tandem, cluster, "down")
    return f"127.0.0.1:{settings['router']['port']}"


def _tandem(cluster: RayCluster, *words: str) -> None:
    command = [sys.executable, "-P", "-m", "tandem.cli.main", *words, "--address", cluster.address]
    ran = subprocess.run(command, env=cluster.environment, capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(f"tandem {words[0]} failed: {ran.stderr}")


async def measure(
    transports: list[str], prompts: list[int], rounds: int, shape: str
) -> dict[tuple[str, int], list[dict[str, float]]]:
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model, vocab_size = write_model(shape, folder, weights=False), SHAPES[shape]["vocab_size"]
        services = [await _start(stack, transport, model, vocab_size) for transport in transports]
        for number in range(rounds + 1):
            for service in services:
                for tokens in prompts:
                    figures = await service.ask(tokens)
                    if number:  # the first round warms up
                        found.setdefault((service.name, tokens), []).append(figures)
    return found


def summary(samples: list[dict[str, float]]) -> dict[str, float]:
    medians = {name: statistics.median(sample[name] for sample in samples) for name in samples[0]}
    hidden = sum(sample["hidden_ms"] for sample in samples) / sum(sample["transfer_ms"] for sample in samples)
    return {**medians, "hidden_share": hidden, "gap_steps": medians["gap_ms"] / medians["step_ms"]}


def table(cases: dict[tuple[str, int], dict[str, float]]) -> Table:
    result = Table(title="handoff, medians")
    for name in (
        "transport",
        "prompt",
        "KV MiB",
        "prefill ms",
        "transfer ms",
        "hidden",
        "gap ms",
        "step ms",
        "gap in steps",
    ):
        result.add_column(name, justify="left" if name == "transport" else "right")
    for (transport, tokens), case in cases.items():
        figures = [f"{case[name]:.1f}" for name in ("kv_mib", "prefill_ms", "transfer_ms")]
        gap = [f"{case[name]:.1f}" for name in ("gap_ms", "step_ms", "gap_steps")]
        result.add_row(transport, str(tokens), *figures, f"{case['hidden_share']:.0%}", *gap)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="160m", choices=SHAPES)
    parser.add_argument("--prompts", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--transports", nargs="+", choices=TRANSPORTS, default=list(TRANSPORTS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    transports = installed({transport: transport for transport in options.transports})
    found = asyncio.run(measure(transports, options.prompts, options.rounds, options.shape))
    cases = {case: summary(samples) for case, samples in found.items()}
    Console(width=110).print(table(cases))
    record.write(
        options.output,
        shape=options.shape,
        rounds=options.rounds,
        cases=[{"transport": name, "prompt": tokens, **case} for (name, tokens), case in cases.items()],
    )


if __name__ == "__main__":
    main()
