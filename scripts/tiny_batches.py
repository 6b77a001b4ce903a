"""The corpus in batches of tokens. Everything here decides the bytes of the trained model (see train_tiny_model.py)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from tiny_corpus import REQUIRED, Fact, chats, long_facts
from tiny_tokenizer import EOS_ID, PAD_ID
from tokenizers import Tokenizer

BATCH_SENTENCES = 64
BATCH_TOKENS = 1536  # with padding: stories come in batches of a dozen
LONG_EVERY = 4  # every fourth step trains on packed contexts instead of single sentences
LONG_SHAPES = ((4, 256), (2, 512), (4, 256), (1, 1024))  # (texts, tokens), in turn: at most 1024 tokens a step
IGNORE = -100

REQUIRED_REPEATS = 12  # copies in each epoch, so that their margins are the widest


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
