"""How fast is the engine, how near to the machine's roof, as a client of the service sees it, and beside vLLM.

usage: python benchmarks/engine.py [--shape 160m | --model DIR] [--device cpu|cuda] [--peer VENV] [--rounds 3]

Prints, for each case, prefill and decode tokens/s and each as a share of a roof measured in the same run: for
prefill the machine's matrix products, for decode whichever is lower of reading weights and KV once a step and of the
step's matrix products. A service of one colocated worker measures the same cases at its client ("served"), and with
--peer so does vLLM (from a virtual environment that has it). They take turns case by case; an engine that waits is
stopped (SIGSTOP), a service idles; ratios are medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import record
from rich.console import Console
from rich.table import Table
from shapes import SHAPES, write_model
from side import Side

HERE = Path(__file__).resolve().parent
CASES = {
    "prefill 1 x 1024": "1x1024x1",
    "prefill 8 x 512": "8x512x1",
    "decode, batch 1, context 16": "1x16x48",
    "decode, batch 16, context 16": "16x16x48",
    "decode, batch 16, context 256": "16x256x24",
    "decode, batch 16, context 1024": "16x1024x16",
}
Answer = dict[str, float]
SERVED_AIM = 0.95


class Pausing(Side):
    """Stopped while it is not its turn, so that idle threads do not spin."""

    def __init__(self, *command: str) -> None:
        super().__init__(command, stderr=None if os.environ.get("VERBOSE") else subprocess.DEVNULL, own_group=True)
        self._signal(signal.SIGSTOP)

    def ask(self, line: str) -> Answer:
        self._signal(signal.SIGCONT)
        answer = super().ask(line)
        self._signal(signal.SIGSTOP)
        return answer

    def close(self) -> None:
        """vLLM's engine is a child of its own."""
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, signum: signal.Signals) -> None:
        os.killpg(self.pid, signum)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape (default 160m, 8b on cuda)")
    parser.add_argument("--model", type=Path, help="a model directory instead of a shape")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--peer", type=Path, metavar="VENV", help="virtual environment with vLLM")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--case", action="append", help="BATCHxINPUTxOUTPUT instead of the named cases")
    parser.add_argument("--output", type=Path, help="write the results as JSON too")
    return parser.parse_args()


def settings(options: argparse.Namespace, model: Path) -> dict[str, Any]:
    cuda = options.device == "cuda"
    return {
        "model": {
            "path": str(model),
            "load_format": "auto" if options.model or options.peer else "dummy",
            "dtype": "bfloat16" if cuda else "float32",
        },
        "engine": {
            "device": options.device,
            # Twice, with as many copies of the model: 8b is to fit twice into 80 GB.
            "kv_memory_mib": 8 << 10 if cuda else 2 << 10,
            "max_step_tokens": 8192 if cuda else 4096,
            "prefix_cache": False,
            "threads": options.threads,
        },
    }


def measure(options: argparse.Namespace, model: Path) -> dict[str, Any]:
    cases = {case: case for case in options.case} if options.case else CASES
    given = json.dumps(settings(options, model))
    sides: dict[str, Side] = {"tandem": Pausing(sys.executable, str(HERE / "engine_side.py"), given)}
    try:
        sides["served"] = Side([sys.executable, "-P", str(HERE / "engine_served.py"), given])
        if options.peer:
            python = str(options.peer / "bin" / "python")
            sides["vllm"] = Pausing(
                python, str(HERE / "vllm_offline.py"), str(model), "--threads", str(options.threads)
            )
        answers: dict[str, dict[str, list[Answer]]] = {name: {side: [] for side in sides} for name in cases}
        for turn in range(options.rounds):
            for name, case in cases.items():
                # Whoever goes first in one round goes second in the next.
                for side in sorted(sides, reverse=turn % 2 == 1):
                    answers[name][side].append(sides[side].ask(case))
        return {"facts": sides["tandem"].hello["ready"], "answers": answers, "cases": cases}
    finally:
        for side in sides.values():
            side.close()


def roofs_of(case: str, facts: Answer, weights: tuple[int, int], itemsize: int) -> Answer:
    """Tokens/s that the machine's roofs allow. weights: elements of the layers' matrices, and of the output matrix."""
    batch, given, output = map(int, case.split("x"))
    layers, head = weights
    prefill = facts["flop_s"] / (2 * (layers + head / given))
    context = given + output / 2
    read_s = ((layers + head) * itemsize + batch * context * facts["kv_bytes_per_token"]) / facts["read_bytes_s"]
    compute_s = 2 * batch * (layers + head) / facts["flop_s"]
    return {"prefill_tok_s": prefill, "decode_tok_s": batch / max(read_s, compute_s)}


def weights_of(model: Path) -> tuple[int, int]:
    """Of a Llama-like configuration."""
    config = json.loads((model / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    attention = hidden * head_dim * (2 * heads + 2 * config.get("num_key_value_heads", heads))
    layer = attention + 3 * hidden * config["intermediate_size"]
    return config["num_hidden_layers"] * layer, config["vocab_size"] * hidden


def summarize(results: dict[str, Any], model: Path, itemsize: int) -> list[dict[str, Any]]:
    rows = []
    for name, sides in results["answers"].items():
        case = results["cases"][name]
        roofs = roofs_of(case, results["facts"], weights_of(model), itemsize)
        metric = "prefill_tok_s" if case.endswith("x1") else "decode_tok_s"
        ours = [answer[metric] for answer in sides["tandem"]]
        row: dict[str, Any] = {"case": name, "metric": metric, "tandem": statistics.median(ours)}
        row["share_of_roof"] = row["tandem"] / roofs[metric]
        served = [answer[metric] for answer in sides["served"]]
        row["served_ratios"] = [a / b for a, b in zip(served, ours, strict=True)]
        if "vllm" in sides:
            theirs = [answer[metric] for answer in sides["vllm"]]
            row["vllm"] = statistics.median(theirs)
            row["ratios"] = [a / b for a, b in zip(ours, theirs, strict=True)]
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]], facts: Answer) -> None:
    reads, flops = facts["read_bytes_s"] / 1e9, facts["flop_s"] / 1e9
    table = Table(title=f"roofs in this run: reads {reads:.1f} GB/s, matrix products {flops:.0f} GFLOP/s")
    peer = ("vLLM tok/s", "Tandem / vLLM") if "vllm" in rows[0] else ()
    for heading in ("case", "tok/s", "of roof", "served / engine", *peer):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for row in rows:
        cells = [row["case"], f"{row['tandem']:.1f}", f"{row['share_of_roof']:.0%}", spread(row["served_ratios"])]
        if "vllm" in row:
            cells += [f"{row['vllm']:.1f}", spread(row["ratios"])]
        table.add_row(*cells)
    Console(width=120).print(table)
    decodes = [row for row in rows if row["metric"] == "decode_tok_s"]
    if decodes:
        least = min(decodes, key=lambda row: statistics.median(row["served_ratios"]))
        share = statistics.median(least["served_ratios"])
        met = "met" if share >= SERVED_AIM else "missed"
        print(f"served decode: {share:.2f} of the engine's or more ({least['case']}); the aim, {SERVED_AIM}, is {met}")


def spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def main() -> None:
    options = parse()
    shape = options.shape or ("8b" if options.device == "cuda" else "160m")
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or write_model(shape, Path(folder), weights=options.peer is not None)
        results = measure(options, model)
        rows = summarize(results, model, 2 if options.device == "cuda" else 4)
    show(rows, results["facts"])
    record.write(
        options.output,
        threads=options.threads,
        model=str(options.model) if options.model else f"shape {shape}, random weights",
        facts=results["facts"],
        rows=rows,
    )


if __name__ == "__main__":
    main()
