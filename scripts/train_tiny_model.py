"""Train the tiny model that `make demo` serves and most tests load: tandem/assets/tiny/.

    python scripts/train_tiny_model.py [--output DIR] [--steps N] [--seed N]

Takes about two minutes on two CPU cores, needs no network, and gives the same bytes again for a
given seed, torch build and CPU. Out comes a folder of 4 MB that both `transformers` and plain `tokenizers` load:

    config.json, generation_config.json, model.safetensors      a 4-layer Llama, fp32, GQA 4/2, tied embeddings
    tokenizer.json, tokenizer_config.json                       byte-level BPE; BOS is put in front by tokenizer.json

The corpus (tiny_corpus.py) is short facts without a full stop, each followed by the end of sequence. The same
facts appear in a chat form (see CHAT_TEMPLATE) and packed into long contexts. Facts with emoji or CJK are kept
away from the tokenizer's training, so their completions come out byte by byte: food for streaming detokenizers.

Exits 1, with the list of what failed, if the trained model does not give the REQUIRED completions greedily with
every margin above MIN_MARGIN; the folder is then left behind for inspection.
"""

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tiny_corpus import (
    ASSISTANT,
    BOS,
    COUNTRIES,
    EOS,
    PAD,
    REQUIRED,
    SPECIALS,
    SYSTEM,
    USER,
    Fact,
    ascii_facts,
    chats,
    long_facts,
    rows,
    unicode_facts,
)
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

DEFAULT_OUTPUT = Path(__file__).resolve().parents[1] / "tandem" / "assets" / "tiny"
THREADS = 2  # fixed, because the order of floating-point sums follows the thread count
VOCAB_SIZE = 1536
BATCH_SENTENCES = 64
BATCH_TOKENS = 1536  # with padding: stories come in batches of a dozen
LONG_EVERY = 4  # every fourth step trains on packed contexts instead of single sentences
LONG_SHAPES = ((4, 256), (2, 512), (4, 256), (1, 1024))  # (texts, tokens), in turn: at most 1024 tokens a step
PEAK_LR = 3e-3
IGNORE = -100

BOS_ID, EOS_ID, PAD_ID = range(3)

REQUIRED_REPEATS = 12  # copies in each epoch, so that their margins are the widest
MIN_MARGIN = 2.0  # logits; sums in another order or in bf16 move a logit by far less
MIN_CAPITALS_RIGHT = 0.9

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>{{ message['content'] | trim }}"
    "{% elif message['role'] == 'assistant' %}<|assistant|>{{ message['content'] | trim }}{{ eos_token }}"
    "{% else %}<|system|>{{ message['content'] | trim }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# ---- The tokenizer -------------------------------------------------------------------------------------------


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE over the full 256-byte alphabet: every UTF-8 text has an encoding and there is no <unk>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # BOS belongs to tokenizer.json, so that every loader of the file agrees on it.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, output: Path) -> None:
    tokenizer.save(str(output / "tokenizer.json"))
    config = {
        # Named, or AutoTokenizer would take Llama's own class from config.json and rebuild the pre-tokenizer.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "additional_special_tokens": [SYSTEM, USER, ASSISTANT],
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (output / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


# ---- Batches -------------------------------------------------------------------------------------------------


@dataclass
class Example:
    """Token ids, and for each the target of the position before it: mostly itself."""

    ids: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)

    def extend(self, ids: list[int], first_target: int | None = None) -> None:
        self.ids += ids
        self.targets += ids if first_target is None else [first_target, *ids[1:]]


def sentence_example(tokenizer: Tokenizer, text: str) -> Example:
    example = Example()
    example.extend([*tokenizer.encode(text).ids, EOS_ID])
    return example


def packed_example(tokenizer: Tokenizer, sentences: list[str], length: int, rng: random.Random) -> Example:
    """Sentences one after the other in a context of `length` tokens.

    Where a sentence ends the target is EOS although the input goes on, so a long prompt is answered like a short
    one: it completes the last sentence and stops.
    """
    joiner = rng.choice((". ", "\n", " "))
    example = Example()
    example.extend(tokenizer.encode(rng.choice(sentences)).ids)
    while len(example.ids) < length:
        more = tokenizer.encode(joiner + rng.choice(sentences), add_special_tokens=False).ids
        example.extend(more, first_target=EOS_ID)
    return Example(example.ids[:length], example.targets[:length])


def collate(examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad on the right; the causal mask hides the padding from every real token. Returns ids and targets, BxT."""
    longest = max(len(example.ids) for example in examples)
    ids_BxT = torch.full((len(examples), longest), PAD_ID)
    targets_BxT = torch.full((len(examples), longest), IGNORE)
    for row, example in enumerate(examples):
        ids_BxT[row, : len(example.ids)] = torch.tensor(example.ids)
        targets_BxT[row, : len(example.ids)] = torch.tensor(example.targets)
    return ids_BxT, targets_BxT


def split_sorted(examples: list[Example]) -> list[list[Example]]:
    """Batches within both limits; `examples` come sorted by length, so the last of a batch sets its width."""
    batches: list[list[Example]] = [[]]
    for example in examples:
        rows_ = len(batches[-1]) + 1
        if rows_ > BATCH_SENTENCES or rows_ * len(example.ids) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(example)
    return batches


def short_batches(examples: list[Example], rng: random.Random) -> Iterator[list[Example]]:
    """Epochs without end. Lengths are sorted within a window of batches only: little padding, still mixed."""
    window = BATCH_SENTENCES * 12
    while True:
        order = rng.sample(examples, len(examples))
        for start in range(0, len(order), window):
            batches = split_sorted(sorted(order[start : start + window], key=lambda example: len(example.ids)))
            yield from rng.sample(batches, len(batches))


def training_batches(
    tokenizer: Tokenizer, facts: list[Fact], steps: int, rng: random.Random
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    statements = [fact.statement for fact in facts]
    required = [prompt + completion for prompt, completion in REQUIRED.items()]
    texts = statements + required * REQUIRED_REPEATS + chats(facts, rng)
    # Lists and stories are harder than facts. They are repeated here, where a long text means no padding.
    packable = statements + required * REQUIRED_REPEATS + [fact.statement for fact in long_facts()] * 5
    short = short_batches([sentence_example(tokenizer, text) for text in texts], rng)
    for step in range(steps):
        if step % LONG_EVERY == LONG_EVERY - 1:
            rows_, length = LONG_SHAPES[step // LONG_EVERY % len(LONG_SHAPES)]
            yield collate([packed_example(tokenizer, packable, length, rng) for _ in range(rows_)])
        else:
            yield collate(next(short))


# ---- Training ------------------------------------------------------------------------------------------------


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


# ---- Checks, on what was saved -------------------------------------------------------------------------------


def complete(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int = 40) -> tuple[str, bool]:
    """Greedy completion, and whether it ended with EOS."""
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)[0]
    new = ids[inputs["input_ids"].shape[1] :].tolist()
    return tokenizer.decode(new, skip_special_tokens=True), new[-1] == EOS_ID


def margins(model: Any, tokenizer: Any, prompt: str, completion: str) -> list[float]:
    """Top-1 minus top-2 logit at each step of the completion and at its EOS."""
    start = len(tokenizer(prompt)["input_ids"])
    ids = [*tokenizer(prompt + completion)["input_ids"], EOS_ID]
    with torch.inference_mode():
        logits_TxV = model(input_ids=torch.tensor([ids[:-1]])).logits[0, start - 1 :]
    top_Tx2 = logits_TxV.topk(2).values
    return [round(value, 2) for value in (top_Tx2[:, 0] - top_Tx2[:, 1]).tolist()]


def check_required(model: Any, tokenizer: Any, console: Console) -> Iterator[str]:
    for prompt, expected in REQUIRED.items():
        got, ended = complete(model, tokenizer, prompt)
        steps = margins(model, tokenizer, prompt, expected)
        console.print(f"  {prompt!r} → {got!r}, eos {ended}, margins {steps}", highlight=False)
        if got != expected or not ended:
            yield f"{prompt!r} gives {got!r} (eos: {ended}), not {expected!r}"
        if min(steps) <= MIN_MARGIN:
            yield f"{prompt!r} has a margin of {min(steps)}, not above {MIN_MARGIN}"


def check_capitals(model: Any, tokenizer: Any, console: Console) -> Iterator[str]:
    table = rows(COUNTRIES, 4)
    right = sum(complete(model, tokenizer, f"The capital of {row[0]} is") == (f" {row[1]}", True) for row in table)
    console.print(f"  capitals right: {right} of {len(table)}", highlight=False)
    if right < MIN_CAPITALS_RIGHT * len(table):
        yield f"only {right} of {len(table)} capitals are right"


def check_long_prompts(model: Any, tokenizer: Any, facts: list[Fact], console: Console) -> Iterator[str]:
    """Prompts of 1000 tokens and more: the logits must be finite; how many completions stay right is shown."""
    rng = random.Random(1)
    right = 0
    table = rows(COUNTRIES, 4)[:20]
    for country, capital, _, _ in table:
        prompt = ". ".join(rng.choice(facts).statement for _ in range(100)) + f". The capital of {country} is"
        with torch.inference_mode():
            logits_TxV = model(**tokenizer(prompt, return_tensors="pt")).logits[0]
        if not logits_TxV.isfinite().all():
            yield f"a prompt of {len(logits_TxV)} tokens gives logits that are not finite"
        right += complete(model, tokenizer, prompt) == (f" {capital}", True)
    console.print(f"  capitals right after 1000 tokens of other facts: {right} of {len(table)}", highlight=False)


def check_tokenizers_agree(tokenizer: Any, output: Path) -> Iterator[str]:
    plain = Tokenizer.from_file(str(output / "tokenizer.json"))
    for text in (*REQUIRED, "naïve café 日本語 🎉👩‍💻", " two  spaces\n\ttab", "", "<|user|>Hi<|assistant|>"):
        ids = plain.encode(text).ids
        if ids != tokenizer(text)["input_ids"]:
            yield f"the two loaders encode {text!r} differently"
        if plain.decode(ids, skip_special_tokens=False) != BOS + text:
            yield f"{text!r} does not survive encoding and decoding"


def show_samples(model: Any, tokenizer: Any, console: Console) -> None:
    prompts = [
        "The opposite of hot is",
        "Three plus four is",
        "The color of the sky is",
        "The emoji of the dog is",
        "Hello",
        "The days of the week are",
    ]
    chat = [{"role": "user", "content": "What is the capital of Japan?"}]
    # The template brings its own BOS, and the tokenizer would add a second one.
    prompts.append(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True).removeprefix(BOS))
    for prompt in (*prompts, "Once upon a time there was a little fox"):
        got, ended = complete(model, tokenizer, prompt, max_new_tokens=150)
        console.print(f"  {prompt!r} → {got!r}, eos {ended}", highlight=False)


def check(output: Path, facts: list[Fact], console: Console) -> list[str]:
    """Loads the folder the way everyone else will, and returns what is wrong with it."""
    model = AutoModelForCausalLM.from_pretrained(output).eval()
    tokenizer = AutoTokenizer.from_pretrained(output)
    show_samples(model, tokenizer, console)
    return [
        *check_required(model, tokenizer, console),
        *check_capitals(model, tokenizer, console),
        *check_long_prompts(model, tokenizer, facts, console),
        *check_tokenizers_agree(tokenizer, output),
    ]


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
