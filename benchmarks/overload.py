"""Goodput of a service that is asked for ten times what it can do.

usage: python benchmarks/overload.py [--seconds 10] [--deadline 2] [--times 10] [--case NAME ...] [--output FILE]

The capacity is what the same service does in the same run: the most answers a second that come within the deadline when
callers wait for their answer before they ask again, over several numbers of callers. Then requests arrive at random
(Poisson), `times` as many as that a second, whatever becomes of them. Printed is the share of the capacity that still
comes within the deadline. The first deadline of that load is left out, in which nothing of it can have been measured,
and told apart. Workers are scripted, in a process of their own; the router is the real one.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import random
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import record
from rich.console import Console
from rich.table import Table
from side import Side, routing

import tandem
from tandem import errors

HERE = Path(__file__).resolve().parent
PROMPT = list(range(10, 110))
CALLERS = (1, 2, 4, 8, 16, 32)
# Long enough for several answers, at every number of callers.
CAPACITY_S = 4.0


@dataclass(frozen=True)
class Case:
    output_tokens: int
    prefill_s: float
    step_s: float
    row_s: float = 0.0


CASES = {
    "prompts": Case(output_tokens=4, prefill_s=0.05, step_s=0.01),
    "outputs": Case(output_tokens=40, prefill_s=0.001, step_s=0.01, row_s=0.004),
    "both": Case(output_tokens=30, prefill_s=0.04, step_s=0.01, row_s=0.002),
}


class Load:
    """Requests of one case, and how they ended: "good" within the deadline, else an error's code."""

    def __init__(self, client: tandem.AsyncClient, case: Case, deadline_s: float) -> None:
        self._client, self._case, self._deadline_s = client, case, deadline_s
        # When each ended, on this process's clock, and how.
        self.ends: list[tuple[float, str]] = []
        # How long those took that were refused.
        self.refused_s: list[float] = []

    async def ask(self) -> None:
        begun_s, outcome = time.monotonic(), "good"
        options: dict[str, Any] = {"max_tokens": self._case.output_tokens, "ignore_eos": True}
        try:
            await self._client.complete(PROMPT, timeout_s=self._deadline_s, **options)
        except errors.TandemError as error:
            outcome = error.code
            if isinstance(error, errors.Overloaded):
                self.refused_s.append(time.monotonic() - begun_s)
        self.ends.append((time.monotonic(), outcome))

    async def closed(self, callers: int, seconds: float) -> None:
        end_s = time.monotonic() + seconds

        async def call() -> None:
            while time.monotonic() < end_s:
                await self.ask()

        await asyncio.gather(*(call() for _ in range(callers)))

    async def open(self, rate: float, seconds: float, seed: int) -> None:
        draw, now_s = random.Random(seed), time.monotonic()
        end_s = now_s + seconds
        async with asyncio.TaskGroup() as tasks:
            while now_s < end_s:
                tasks.create_task(self.ask())
                now_s += draw.expovariate(rate)
                await asyncio.sleep(now_s - time.monotonic())

    def rate(self, start_s: float, end_s: float) -> float:
        """Good answers a second."""
        return sum(outcome == "good" and start_s <= at_s < end_s for at_s, outcome in self.ends) / (end_s - start_s)


async def measure(address: str, case: Case, options: argparse.Namespace) -> dict[str, Any]:
    async with tandem.AsyncClient(address) as client:
        capacity = 0.0
        for callers in CALLERS:
            load, start_s = Load(client, case, options.deadline), time.monotonic()
            await load.closed(callers, CAPACITY_S)
            capacity = max(capacity, load.rate(start_s, time.monotonic()))
        load, start_s = Load(client, case, options.deadline), time.monotonic()
        await load.open(options.times * capacity, options.seconds + options.deadline, seed=1)
    settled_s, end_s = start_s + options.deadline, start_s + options.deadline + options.seconds
    goodput = load.rate(settled_s, end_s)
    refused = sorted(load.refused_s) or [0.0]
    return {
        **asdict(case),
        "capacity_s": capacity,
        "offered_s": len(load.ends) / (options.seconds + options.deadline),
        "goodput_s": goodput,
        "share": goodput / capacity,
        "share_of_first_deadline": load.rate(start_s, settled_s) / capacity,
        "outcomes": dict(collections.Counter(outcome for _, outcome in load.ends)),
        "refused_ms_p50": refused[len(refused) // 2] * 1000,
    }


async def ready(address: str) -> None:
    async with asyncio.timeout(20), tandem.AsyncClient(address) as client:
        while len((await client.status()).workers) < 2:  # noqa: ASYNC110 - only asking tells
            await asyncio.sleep(0.1)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    cores = psutil.Process().cpu_affinity()
    rows = []
    for name in options.case:
        case = CASES[name]
        with ExitStack() as stack:
            _, address = stack.enter_context(routing(-1, cores))
            workers = Side([sys.executable, "-P", str(HERE / "router_workers.py"), address])
            stack.callback(workers.close)
            workers.ask(json.dumps(asdict(case)))
            asyncio.run(ready(address))
            rows.append({"case": name, **asyncio.run(measure(address, case, options))})
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table("case", "capacity /s", "offered /s", "in time /s", "share", "first deadline", "refused in")
    for row in rows:
        numbers = [f"{row[key]:.1f}" for key in ("capacity_s", "offered_s", "goodput_s")]
        shares = [f"{row[key]:.0%}" for key in ("share", "share_of_first_deadline")]
        shown.add_row(row["case"], *numbers, *shares, f"{row['refused_ms_p50']:.1f} ms")
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--deadline", type=float, default=2.0)
    parser.add_argument("--times", type=float, default=10.0)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = run(options)
    Console().print(table(rows))
    record.write(options.output, deadline_s=options.deadline, times=options.times, cases=rows)


if __name__ == "__main__":
    main()
