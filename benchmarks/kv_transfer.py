"""How fast KV moves between two processes of this machine, by each transport.

usage: python benchmarks/kv_transfer.py [--rounds 7] [--mib 1 16 128] [--output FILE]

For each transport and size: GB/s from the opening to the acknowledged seal, as a share of two roofs that the same run
measures (a warm memcpy on one core, a raw loopback socket between two processes), and CPU seconds of both ends and of
Ray's own processes per GB. The cases take turns, round by round; figures are medians. Checksums are on, as always; two
cases go without those of payloads, to show what they cost. Cases whose library is not installed are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import record
from optional import installed
from rich.console import Console
from rich.table import Table
from side import KV_SIDE, Side, ray_cluster

TOKEN_BYTES = 12 * 2 * 12 * 64 * 4
ROOF_BYTES = 256 << 20


class Case(NamedTuple):
    transport: str
    # In a Ray cluster of its own.
    ray: bool = False
    # Of all its processes.
    environment: Mapping[str, str] = MappingProxyType({})
    # Of the worker's configuration.
    settings: Mapping[str, str] = MappingProxyType({})


CASES = {
    "shm": Case("shm"),
    "shm, payloads unchecked": Case("shm", environment={"KV_SIDE_UNCHECKED": "1"}),
    "nixl": Case("nixl", settings={"nixl_devices": "lo"}),
    "grpc": Case("grpc"),
    "grpc, payloads unchecked": Case("grpc", environment={"KV_SIDE_UNCHECKED": "1"}),
    "ray": Case("ray", ray=True),
    "ray, memory preallocated": Case("ray", ray=True, environment={"RAY_preallocate_plasma_memory": "1"}),
}


class Pair:
    """A sender and a receiver, and the Ray cluster under them if there is one."""

    def __init__(self, stack: ExitStack, case: Case, settings: dict[str, int]) -> None:
        self._transport = case.transport
        config = json.dumps({"worker": {**settings, **case.settings}})
        environment = {**os.environ, **case.environment}
        self._sides: list[Side] = []
        cluster = ""
        if case.ray:
            side, cluster, environment = stack.enter_context(ray_cluster(case.environment))
            self._sides.append(side)
        port = self._start(stack, environment, "receive", config, cluster).hello["port"]
        self._sender = self._start(stack, environment, "send", config, cluster, str(port))

    def _start(self, stack: ExitStack, environment: dict[str, str], *arguments: str) -> Side:
        side = Side([sys.executable, "-P", str(KV_SIDE), *arguments], environment)
        stack.callback(side.close)
        self._sides.append(side)
        return side

    def measure(self, tokens: int, repeats: int) -> dict[str, float]:
        """GB/s and CPU seconds per GB of some transfers, one after another."""
        case = json.dumps({"transport": self._transport, "tokens": tokens})
        before = sum(side.cpu_s() for side in self._sides)
        seconds = [self._sender.ask(case)["seconds"] for _ in range(repeats)]
        cpu_s = sum(side.cpu_s() for side in self._sides) - before
        gigabytes = tokens * TOKEN_BYTES / 1e9
        return {"gb_s": gigabytes / statistics.median(seconds), "cpu_s_per_gb": cpu_s / (gigabytes * repeats)}


def memcpy_gb_s() -> float:
    source, target = np.ones(ROOF_BYTES // 8), np.empty(ROOF_BYTES // 8)
    target[:] = source
    started = time.perf_counter()
    target[:] = source
    return ROOF_BYTES / 1e9 / (time.perf_counter() - started)


def socket_gb_s() -> float:
    with socket.create_server(("127.0.0.1", 0)) as server, reader(server.getsockname()[1]):
        link, _ = server.accept()
        with link:
            payload = memoryview(bytes(1 << 20))
            link.sendall(payload)  # warm
            started = time.perf_counter()
            for _ in range(ROOF_BYTES // len(payload)):
                link.sendall(payload)
            link.shutdown(socket.SHUT_WR)
            link.recv(1)  # the other end has read everything
            return ROOF_BYTES / 1e9 / (time.perf_counter() - started)


@contextmanager
def reader(port: int) -> Iterator[None]:
    code = (
        f"import socket; link = socket.create_connection(('127.0.0.1', {port})); into = bytearray(1 << 20)\n"
        "while link.recv_into(into): pass\nlink.sendall(b'.')"
    )
    with subprocess.Popen([sys.executable, "-c", code]):
        yield


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--mib", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--transport", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=BYTES", help="of the worker's configuration")
    parser.add_argument("--output", type=Path, help="write the results as JSON too")
    return parser.parse_args()


def run(options: argparse.Namespace) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The roofs and a row for each case."""
    settings = {key: int(value) for key, value in (each.split("=") for each in options.set)}
    with ExitStack() as stack:
        names = installed({name: CASES[name].transport for name in options.transport})
        pairs = {name: Pair(stack, CASES[name], settings) for name in names}
        cases = [(name, mib) for mib in options.mib for name in pairs]
        samples: dict[tuple[str, int], list[dict[str, float]]] = {case: [] for case in cases}
        roofs: dict[str, list[float]] = {"memcpy": [], "socket": []}
        for turn in range(options.rounds + 1):
            roofs["memcpy"].append(memcpy_gb_s())
            roofs["socket"].append(socket_gb_s())
            for name, mib in cases if turn % 2 else cases[::-1]:
                sample = pairs[name].measure((mib << 20) // TOKEN_BYTES, max(3, 32 // mib))
                if turn:  # the first round warms everything up
                    samples[name, mib].append(sample)
    medians = {name: statistics.median(values) for name, values in roofs.items()}
    return medians, [_row(name, mib, samples[name, mib], medians) for name, mib in cases]


def _row(name: str, mib: int, samples: list[dict[str, float]], roofs: dict[str, float]) -> dict[str, Any]:
    rates = [sample["gb_s"] for sample in samples]
    rate = statistics.median(rates)
    return {
        "transport": name,
        "mib": mib,
        "gb_s": rate,
        "gb_s_range": [min(rates), max(rates)],
        "of_memcpy": rate / roofs["memcpy"],
        "of_socket": rate / roofs["socket"],
        "cpu_s_per_gb": statistics.median(sample["cpu_s_per_gb"] for sample in samples),
    }


def show(rows: list[dict[str, Any]], roofs: dict[str, float]) -> None:
    title = f"roofs in this run: memcpy {roofs['memcpy']:.1f} GB/s, loopback socket {roofs['socket']:.1f} GB/s"
    table = Table(title=title)
    for heading in ("transport", "MiB", "GB/s", "of memcpy", "of socket", "CPU s/GB"):
        table.add_column(heading, justify="left" if heading == "transport" else "right")
    for row in rows:
        spread = f"{row['gb_s']:.2f} ({row['gb_s_range'][0]:.2f}-{row['gb_s_range'][1]:.2f})"
        shares = (f"{row['of_memcpy']:.0%}", f"{row['of_socket']:.0%}")
        table.add_row(row["transport"], str(row["mib"]), spread, *shares, f"{row['cpu_s_per_gb']:.2f}")
    Console(width=100).print(table)


def main() -> None:
    options = parse()
    roofs, rows = run(options)
    show(rows, roofs)
    record.write(options.output, roofs_gb_s=roofs, rows=rows)


if __name__ == "__main__":
    main()
