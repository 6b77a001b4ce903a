"""Do `tandem bench` and `vllm bench serve` measure the same? Both load the same service with the same seeds, by turns.

usage: python benchmarks/load_generators.py --peer VENV [--engine] [--rounds 3] [--num-prompts 80] [--rate 8]
       [--output FILE]

VENV is a virtual environment with vLLM. The service is Tandem's router with its OpenAI door, and behind it workers
without a model that keep a pace by the clock (router_workers.py): one prompt after the other, then a step for all live
requests. So what is measured depends on the load alone. With --engine, they are a prefill and a decode worker with the
160M shape and random weights: on a machine of few cores these share them with the tools, so the machine must be quiet,
and the rate low (--num-prompts 20 --rate 1).

A round's number is its seed: both tools send requests of the same lengths at the same times (vLLM's prompts are text,
ours token ids), each twice, in the order A B B A, so that what drifts meets both alike. A figure's difference is that
of the tools' means in a round, and of the rounds the median. Beside it stands how far two runs of the same tool are
apart: a difference that is not larger says nothing about the tools. The script fails if one is above 5 %.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from statistics import mean, median
from typing import Any

import record
from rich.console import Console
from rich.table import Table
from shapes import write_model
from side import Side, routing

from tandem.client import Client
from tandem.config import TINY_MODEL

HERE = Path(__file__).resolve().parent
INPUT_TOKENS, OUTPUT_TOKENS = 128, 24
LIMIT = 0.05
# Of the workers. A prompt's 60 ms at 8 prompts a second: half of the time somebody waits for somebody else.
PACE = {"prefill_s": 0.06, "step_s": 0.03}
READY_S = 20.0
FIGURES = (
    "total_input_tokens",
    "total_output_tokens",
    "request_throughput",
    "output_throughput",
    "total_token_throughput",
    "request_goodput",
    *(f"{head}_{name}_ms" for name in ("ttft", "tpot", "itl", "e2el") for head in ("mean", "median")),
)
# By tool, of both of its runs.
Round = dict[str, list[dict[str, float]]]
# Near the middle: whether a request is good depends on its figures. An engine's vary more, and few of its requests
# near a limit would be all that this says: all are good.
GOODPUT, ENGINE_GOODPUT = ("ttft:150", "tpot:40", "e2el:1000"), ("ttft:2000", "tpot:200", "e2el:10000")


@contextmanager
def paced() -> Iterator[str]:
    """The URL of the OpenAI door of a service without a model."""
    workers_of = [sys.executable, "-P", str(HERE / "router_workers.py")]
    with routing(0, sorted(os.sched_getaffinity(0))) as (_, address), closing(Side([*workers_of, address])) as workers:
        workers.ask(json.dumps(PACE))
        yield f"http://127.0.0.1:{http_port(address)}"


@contextmanager
def engines() -> Iterator[str]:
    """The URL of the OpenAI door of a service with one."""
    with tempfile.TemporaryDirectory() as folder:
        model = write_model("160m", Path(folder) / TINY_MODEL.name, weights=False)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(TINY_MODEL / name, model)
        # A tool's second run of a round would find its first one's prompts.
        config = Path(folder) / "config.json"
        config.write_text(json.dumps({"engine": {"prefix_cache": False}}))
        command = [sys.executable, "-m", "tandem.cli.main", "serve", "--model", str(model), "--load-format", "dummy"]
        command += ["--config", str(config), "--prefill", "1", "--decode", "1", "--port", "0", "--http-port", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            try:
                assert process.stdout is not None
                ready = next((line for line in process.stdout if line.startswith("ready at ")), "")
                found = re.search(r"http://\S+?(?=/v1)", ready)
                assert found, f"the service did not start: {ready or 'it ended'}"
                yield found[0]
            finally:
                process.send_signal(signal.SIGINT)


def http_port(address: str) -> int:
    """Of a router that both workers have joined."""
    until_s = time.monotonic() + READY_S
    with Client(address) as client:
        while len((status := client.status()).workers) < 2:
            assert time.monotonic() < until_s, "the workers did not join"
            time.sleep(0.05)
        return status.http_port


def run(command: list[str], output: Path) -> dict[str, Any]:
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    figures: dict[str, Any] = json.loads(output.read_text())
    assert figures["failed"] == 0, ran.stdout[-2000:]
    return figures


def goodput(options: argparse.Namespace) -> tuple[str, ...]:
    return ENGINE_GOODPUT if options.engine else GOODPUT


def ours(url: str, seed: int, options: argparse.Namespace, output: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "tandem.cli.main", "bench", "run", "--openai", url, "--output", str(output)]
    command += ["--input-len", str(INPUT_TOKENS), "--output-len", str(OUTPUT_TOKENS), "--seed", str(seed)]
    command += ["--num-prompts", str(options.num_prompts), "--request-rate", str(options.rate)]
    return run([*command, "--vocab-size", "1024", "--goodput", *goodput(options)], output)


def theirs(url: str, seed: int, options: argparse.Namespace, output: Path) -> dict[str, Any]:
    command = [str(options.peer / "bin" / "python"), str(HERE / "vllm_serve.py"), "--backend", "openai"]
    command += ["--base-url", url, "--model", TINY_MODEL.name, "--tokenizer", str(TINY_MODEL)]
    command += ["--dataset-name", "random", "--random-input-len", str(INPUT_TOKENS)]
    command += ["--random-output-len", str(OUTPUT_TOKENS), "--ignore-eos"]
    command += ["--num-prompts", str(options.num_prompts), "--request-rate", str(options.rate), "--seed", str(seed)]
    command += ["--ready-check-timeout-sec", "0", "--goodput", *goodput(options)]
    command += ["--percentile-metrics", "ttft,tpot,itl,e2el", "--temperature", "0", "--disable-tqdm", "--save-result"]
    return run([*command, "--result-dir", str(output.parent), "--result-filename", output.name], output)


def measure(options: argparse.Namespace, folder: Path) -> list[Round]:
    rounds = []
    with engines() if options.engine else paced() as url:
        tools: dict[str, Callable[[int], dict[str, Any]]] = {
            "vllm": lambda seed: theirs(url, seed, options, folder / "vllm.json"),
            "tandem": lambda seed: ours(url, seed, options, folder / "tandem.json"),
        }
        for tool in tools.values():
            tool(options.rounds)  # warms everything up
        for seed in range(options.rounds):
            first, second = list(tools) if seed % 2 else reversed(tools)
            found: Round = {tool: [] for tool in tools}
            for tool in (first, second, second, first):
                figures = tools[tool](seed)
                found[tool].append({name: figures[name] for name in FIGURES})
                print(f"round {seed}, {tool}: mean TTFT {figures['mean_ttft_ms']:.1f} ms", file=sys.stderr)
            rounds.append(found)
    return rounds


def compare(rounds: list[Round]) -> dict[str, dict[str, float]]:
    found = {}
    for name in FIGURES:
        vllm, tandem = ([[run[name] for run in each[tool]] for each in rounds] for tool in ("vllm", "tandem"))
        differences = [mean(ours) / mean(theirs) - 1 for ours, theirs in zip(tandem, vllm, strict=True)]
        found[name] = {
            "vllm": median(map(mean, vllm)),
            "tandem": median(map(mean, tandem)),
            "difference": median(differences),
            "repeat": median(abs(again / once - 1) for once, again in vllm + tandem),
        }
    return found


def show(found: dict[str, dict[str, float]]) -> None:
    table = Table(box=None)
    table.add_column("figure", no_wrap=True)
    for head in ("vllm bench serve", "tandem bench", "difference", "same tool again"):
        table.add_column(head, justify="right")
    for name, row in found.items():
        cells = (f"{row['vllm']:.2f}", f"{row['tandem']:.2f}", f"{row['difference']:+.1%}", f"± {row['repeat']:.1%}")
        table.add_row(name, *cells)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True)
    parser.add_argument("--engine", action="store_true", help="a real engine with the 160M shape")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num-prompts", type=int, default=80)
    parser.add_argument("--rate", type=float, default=8.0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rounds = measure(options, Path(folder))
    found = compare(rounds)
    show(found)
    load = {"engine": options.engine, "num_prompts": options.num_prompts, "rate": options.rate}
    record.write(options.output, **load, figures=found, rounds=rounds)
    apart = [name for name, row in found.items() if abs(row["difference"]) > LIMIT]
    if apart:
        sys.exit(f"more than {LIMIT:.0%} apart: {', '.join(apart)}")


if __name__ == "__main__":
    main()
