"""What wire dtype int8 saves, what it costs, and what it does to the answers.

usage: python benchmarks/wire_dtype.py [--rounds 5] [--output FILE]

Between two processes: the same KV over grpc in native numbers and in int8, taking turns. By itself: int8's two copies,
on one core. Answers: a prompt's KV goes through int8 payloads, cut as a sender cuts them, and greedy decoding goes on
from what arrived; beside it, from the KV as it was. The model is transformers' own, so nothing of the engine is in the
figures. `wire_dtype_side.py` measures the last two, in a process of its own.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import record
from rich.console import Console
from rich.table import Table
from shapes import write_model
from side import Side

from kv_transfer import CASES, TOKEN_BYTES, Pair  # kv_transfer.py beside this file; the sides import the package

SIDE = Path(__file__).resolve().parent / "wire_dtype_side.py"
WIRE_DTYPES = ("native", "int8")


def transfers(rounds: int, sizes: list[int]) -> list[dict[str, Any]]:
    """Seconds by size and wire dtype: medians of the rounds. The first round only warms up."""
    with ExitStack() as stack:
        pairs = {name: Pair(stack, CASES["grpc"], {"wire_dtype": name}) for name in WIRE_DTYPES}
        cases = [(mib, name) for mib in sizes for name in WIRE_DTYPES]
        samples: dict[tuple[int, str], list[dict[str, float]]] = {case: [] for case in cases}
        for turn in range(rounds + 1):
            for mib, name in cases if turn % 2 else cases[::-1]:
                sample = pairs[name].measure((mib << 20) // TOKEN_BYTES, max(3, 32 // mib))
                if turn:
                    samples[mib, name].append(sample)
    return [_row(mib, name, samples[mib, name]) for mib, name in cases]


def _row(mib: int, name: str, samples: list[dict[str, float]]) -> dict[str, Any]:
    gigabytes = (mib << 20) // TOKEN_BYTES * TOKEN_BYTES / 1e9
    seconds = [gigabytes / sample["gb_s"] for sample in samples]
    return {
        "mib": mib,
        "wire_dtype": name,
        "seconds": statistics.median(seconds),
        "seconds_range": [min(seconds), max(seconds)],
        "cpu_s_per_gb": statistics.median(sample["cpu_s_per_gb"] for sample in samples),
    }


def alone() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(copies, answers)"""
    with TemporaryDirectory() as folder:
        side = Side([sys.executable, "-P", str(SIDE), str(write_model("160m", Path(folder), weights=False))])
        found = side.hello
        side.close()
    return found["copies"], found["answers"]


def table(title: str, rows: list[list[str]], *headings: str) -> None:
    shown = Table(title=title)
    for at, heading in enumerate(headings):
        shown.add_column(heading, justify="right" if at else "left")
    for row in rows:
        shown.add_row(*row)
    Console(width=110).print(shown)


def show(moved: list[dict[str, Any]], copies: list[dict[str, Any]], answers: list[dict[str, Any]]) -> None:
    rows = [
        [
            f"{row['mib']} MiB, {row['wire_dtype']}",
            "{:.3f} ({:.3f}-{:.3f})".format(row["seconds"], *row["seconds_range"]),
            f"{row['cpu_s_per_gb']:.2f}",
        ]
        for row in moved
    ]
    table("float32 KV between two processes over grpc", rows, "KV", "seconds", "CPU s/GB")
    rows = [
        [row["dtype"], f"{row['bytes_share']:.1%}", *(f"{row[name]:.2f}" for name in ("gather", "quantize", "write"))]
        for row in copies
    ]
    table("on one core, GB/s of native KV", rows, "KV", "bytes of native", "gather native", "quantize", "write")
    rows = [
        [
            f"{row['model']}, {row['prompts']} x {row['prompt_tokens']}",
            f"{row['bytes_share']:.1%}",
            f"{row['logit_l2']:.1e} / {row['logit_l2_most']:.1e}",
            f"{row['logit_most']:.3f} of {row['logit_range']:.1f}",
            f"{row['tokens_forced_equal']:.1%}",
            f"{row['tokens_equal']:.1%}",
            f"{row['answers_equal']} of {row['prompts']}",
            "-" if row["first_divergence"] is None else f"{row['first_divergence']:.0f}",
        ]
        for row in answers
    ]
    headings = ("model, prompts", "bytes", "logits: L2 mean / most", "most off", "same choice", "same tokens")
    table("answers from int8 KV against native KV", rows, *headings, "same answers", "diverge at")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mib", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--output", type=Path, help="write the results as JSON too")
    options = parser.parse_args()
    moved = transfers(options.rounds, options.mib)
    copies, answers = alone()
    show(moved, copies, answers)
    record.write(options.output, transfers=moved, copies=copies, answers=answers)


if __name__ == "__main__":
    main()
