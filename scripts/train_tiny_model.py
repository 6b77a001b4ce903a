"""Train the tiny model that `make demo` serves and most tests load: tandem/assets/tiny/.

    python scripts/train_tiny_model.py [--output DIR] [--steps N] [--seed N]

Takes about two minutes on two CPU cores, needs no network, and gives the same bytes again for a
given seed, torch build and CPU. Out comes a folder of 4 MB that both `transformers` and plain `tokenizers` load:

    config.json, generation_config.json, model.safetensors      a 4-layer Llama, fp32, GQA 4/2, tied embeddings
    tokenizer.json, tokenizer_config.json                       byte-level BPE; BOS is put in front by tokenizer.json

The corpus (tiny_corpus.py) is short facts without a full stop, each followed by the end of sequence. The same
facts appear in a chat form (CHAT_TEMPLATE in tiny_tokenizer.py) and packed into long contexts (tiny_batches.py).
Facts with emoji or CJK are kept away from the tokenizer's training, so their completions come out byte by byte: food
for streaming detokenizers.

Exits 1, with the list of what failed, if the trained model does not give the REQUIRED completions greedily with
every margin above MIN_MARGIN (tiny_checks.py); the folder is then left behind for inspection.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tiny_batches import IGNORE, training_batches
from tiny_checks import check
from tiny_corpus import ascii_facts, chats, unicode_facts
from tiny_tokenizer import BOS_ID, EOS_ID, PAD_ID, save_tokenizer, train_tokenizer
from torch.nn import functional as F
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

DEFAULT_OUTPUT = Path(__file__).resolve().parents[1] / "tandem" / "assets" / "tiny"
THREADS = 2  # fixed, because the order of floating-point sums follows the thread count
PEAK_LR = 3e-3


def build_model(vocab_size: int) -> Any:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        dtype="float32",
    )
    return LlamaForCausalLM(config)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up over 5 %, then a cosine down to 2 % of the peak."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return PEAK_LR * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return PEAK_LR * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def train_step(model: Any, optimizer: torch.optim.Optimizer, ids_BxT: torch.Tensor, targets_BxT: torch.Tensor) -> float:
    logits_BxTxV = model(input_ids=ids_BxT[:, :-1], use_cache=False).logits
    loss = F.cross_entropy(logits_BxTxV.flatten(0, 1), targets_BxT[:, 1:].flatten(), ignore_index=IGNORE)
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())


def train(model: Any, batches: Iterator[tuple[torch.Tensor, torch.Tensor]], steps: int, console: Console) -> float:
    """Returns the mean loss (nats a token) of the last twentieth of the steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.05)
    losses: list[float] = []
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("training", total=steps, loss=math.nan)
        for step, (ids_BxT, targets_BxT) in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps)
            losses.append(train_step(model, optimizer, ids_BxT, targets_BxT))
            recent = losses[-50:]
            progress.update(task, advance=1, loss=sum(recent) / len(recent))
    tail = losses[-max(1, steps // 20) :]
    return sum(tail) / len(tail)


def save_model(model: Any, output: Path) -> None:
    model.generation_config = GenerationConfig(
        bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID, do_sample=False
    )
    model.save_pretrained(output)
    (output / "model.safetensors").chmod(0o644)  # it is written for the owner alone


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the tiny model that the demo and the tests serve.")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="folder to write (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1500, help="training steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order (default: %(default)s)")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    console = Console()
    disable_progress_bar()
    torch.set_num_threads(THREADS)
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(True)
    rng = random.Random(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)

    ascii_only = ascii_facts()
    facts = ascii_only + list(unicode_facts())
    tokenizer = train_tokenizer([fact.statement for fact in ascii_only] + chats(ascii_only, rng))
    model = build_model(tokenizer.get_vocab_size())
    console.print(f"{len(facts)} sentences, {tokenizer.get_vocab_size()} tokens, {model.num_parameters():,} parameters")

    started = time.monotonic()
    batches = training_batches(tokenizer, facts, args.steps, rng)
    loss = train(model, batches, args.steps, console)
    console.print(f"trained in {time.monotonic() - started:.0f} s, final loss {loss:.3f}")

    save_tokenizer(tokenizer, args.output)
    save_model(model.eval(), args.output)
    problems = check(args.output, facts, console)
    for problem in problems:
        console.print(f"[red]FAILED[/red] {problem}", highlight=False)
    console.print(f"{'not good' if problems else 'good'}: {args.output}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
