"""What the router costs: time added to the first token, tokens a second through one process, CPU seconds of both.

usage: python benchmarks/router.py [--seconds 8] [--case NAME ...] [--output FILE]

Four processes: the router, alone on the first core; scripted workers without a model, the clients of the streams and a
probe that asks now and then, on the others. What the router adds is what the probe sees.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import record
from rich.console import Console
from rich.table import Table
from router_client import PROBE_TOKENS
from side import Side, cpu_s, routing

HERE = Path(__file__).resolve().parent
WARM_S = 1.5


@dataclass(frozen=True)
class Case:
    streams: int
    output_tokens: int
    # The decode worker's; what it offers is streams / step_ms.
    step_ms: float


CASES = {
    "requests, one by one": Case(1, 2, 0.0),
    "requests, 16 at once": Case(16, 2, 0.0),
    "1 stream, 20 ms": Case(1, 16, 20.0),
    "1 stream, 0.25 ms": Case(1, 256, 0.25),
    "64 streams, 20 ms": Case(64, 256, 20.0),
    "64 streams, 2.5 ms": Case(64, 256, 2.5),
    "512 streams, 40 ms": Case(512, 256, 40.0),
    "512 streams, 20 ms": Case(512, 256, 20.0),
    "512 streams, 10 ms": Case(512, 256, 10.0),
}


def start(stack: ExitStack, cores: Sequence[int], script: str, *arguments: str) -> Side:
    side = Side([sys.executable, "-P", str(HERE / script), *arguments])
    psutil.Process(side.pid).cpu_affinity(list(cores))
    stack.callback(side.close)
    return side


def measure(case: Case, seconds: float, router: int, workers: Side, clients: Side, probe: Side) -> dict[str, Any]:
    step_s = case.step_ms / 1000
    asked = {"streams": case.streams, "output_tokens": case.output_tokens, "warm_s": WARM_S, "seconds": seconds}
    workers.ask(json.dumps({"step_s": step_s}))
    clients.ask(json.dumps({**asked, "step_s": step_s}))
    before = [cpu_s(router), workers.cpu_s(), clients.cpu_s()]
    probe.ask(json.dumps({"seconds": seconds}))
    seen, probed = clients.read(), probe.read()
    after = [cpu_s(router), workers.cpu_s(), clients.cpu_s()]
    if seen["failed"]:
        raise SystemExit(f"requests failed: {seen['failed'][:3]}")
    elapsed_s = seen["elapsed_s"]
    router_s, *others_s = (end - start for start, end in zip(before, after, strict=True))
    requests, tokens = seen["requests"] + len(probed["routed"]), seen["tokens"] + PROBE_TOKENS * len(probed["routed"])
    return {
        "streams": case.streams,
        "step_ms": case.step_ms,
        "output_tokens": case.output_tokens,
        "offered_tokens_s": case.streams / case.step_ms * 1000 if case.step_ms else None,
        "tokens_s": seen["tokens"] / elapsed_s,
        "requests_s": seen["requests"] / elapsed_s,
        "tokens_per_delta": seen["tokens"] / max(1, seen["deltas"]),
        "ttft_ms": spread_ms(seen["ttft"]),
        "routed_ttft_ms": spread_ms(probed["routed"]),
        "direct_ttft_ms": spread_ms(probed["direct"]),
        "token_lag_ms": spread_ms(seen["lag"]),
        "router_cores": router_s / elapsed_s,
        "others_cores": sum(others_s) / elapsed_s,
        "router_ms_per_request": router_s * 1000 / requests,
        "router_s_per_1000_tokens": router_s * 1000 / tokens,
    }


def spread_ms(seconds: list[float]) -> dict[str, float] | None:
    """p50 and p99; None without values."""
    if not seconds:
        return None
    ordered = sorted(seconds)
    return {f"p{share}": ordered[(len(ordered) - 1) * share // 100] * 1000 for share in (50, 99)}


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    first, *rest = sorted(os.sched_getaffinity(0))
    others = rest or [first]
    with ExitStack() as stack:
        pid, address = stack.enter_context(routing(-1, [first], options.python))
        workers = start(stack, others, "router_workers.py", address)
        direct = f"127.0.0.1:{workers.hello['port']}"
        clients = start(stack, others, "router_client.py", "streams", address)
        probe = start(stack, others, "router_client.py", "probe", address, direct)
        rows = []
        for name in options.case:
            rows.append({"case": name, **measure(CASES[name], options.seconds, pid, workers, clients, probe)})
            print(f"{name}: {rows[-1]['tokens_s']:.0f} tokens/s", file=sys.stderr)
        return rows


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="p50 / p99 in ms; added: through the router less the workers called without it")
    names = "case|tokens/s|streams' TTFT|added|token lag|tokens/delta|router core|ms/req|s/1000 tok"
    for heading in names.split("|"):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for row in rows:
        ttft, lag = row["ttft_ms"], row["token_lag_ms"]
        routed, direct = row["routed_ttft_ms"], row["direct_ttft_ms"]
        added = {key: routed[key] - direct[key] for key in routed}
        table.add_row(
            row["case"],
            f"{row['tokens_s']:.0f}",
            *(f"{each['p50']:.1f} / {each['p99']:.1f}" if each else "-" for each in (ttft, added, lag)),
            f"{row['tokens_per_delta']:.1f}",
            f"{row['router_cores']:.0%}",
            f"{row['router_ms_per_request']:.2f}",
            f"{row['router_s_per_1000_tokens']:.4f}",
        )
    Console(width=130).print(table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0, help="of every case that are measured")
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="starts the router, such as a profiler")
    parser.add_argument("--output", type=Path, help="write the results as JSON too")
    return parser.parse_args()


def main() -> None:
    options = parse()
    rows = run(options)
    show(rows)
    record.write(options.output, rows=rows)


if __name__ == "__main__":
    main()
