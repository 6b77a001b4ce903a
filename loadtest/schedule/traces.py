"""Traces: when real services got how much to do. Lengths and arrivals only, no text."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tandem.errors import ConfigError

TraceKind = Literal["mooncake", "azure"]

# Tokens that one of Mooncake's hash ids stands for.
BLOCK_TOKENS = 512
# Seconds that the clock of a trace advances at a time: what jitter has to undo.
CLOCK_STEP_S: dict[TraceKind, float] = {"mooncake": 3.0, "azure": 0.0}
MAX_TRACE_TOKENS = 1 << 24


@dataclass(frozen=True)
class TraceRow:
    at_s: float
    input_tokens: int
    output_tokens: int
    # Names of the prompt's 512-token blocks, where the trace has them: equal names, equal tokens.
    hash_ids: tuple[int, ...] = ()


def read_trace(kind: TraceKind, path: Path, limit: int) -> list[TraceRow]:
    """The first `limit` rows. Raises ConfigError, naming the line, for a file that is none or cannot be read."""
    rows = {"mooncake": _mooncake_rows, "azure": _azure_rows}[kind]
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            found = list(islice(rows(path, lines), limit))
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from None
    if not found:
        raise ConfigError(f"the trace {path} has no requests", field="trace")
    return found


def check_readable(path: Path) -> None:
    """Raises ConfigError when no file can be read there; what is in it is not looked at."""
    try:
        path.open("rb").close()
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError | UnicodeDecodeError) -> ConfigError:
    reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
    return ConfigError(f"cannot read the trace {path}: {reason}", field="trace")


def _mooncake_rows(path: Path, lines: Iterable[str]) -> Iterator[TraceRow]:
    """JSON lines of Mooncake (FAST'25): timestamp in ms, input_length, output_length, hash_ids."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield _mooncake_row(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise _bad_line(path, number, error) from None


def _mooncake_row(row: Any) -> TraceRow:
    hash_ids = tuple(int(each) for each in row["hash_ids"])
    checked = _checked(float(row["timestamp"]) / 1000, int(row["input_length"]), int(row["output_length"]), hash_ids)
    needed = -(-checked.input_tokens // BLOCK_TOKENS)
    if len(hash_ids) != needed or min(hash_ids) < 0:
        raise ValueError(f"{checked.input_tokens} tokens need {needed} hash_ids, none below 0")
    return checked


def _azure_rows(path: Path, lines: Iterable[str]) -> Iterator[TraceRow]:
    """AzureLLMInferenceTrace (Splitwise, ISCA'24): TIMESTAMP, ContextTokens, GeneratedTokens."""
    for number, row in enumerate(csv.DictReader(lines), 2):
        try:
            at_s = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()  # it has 7 digits; Python reads 6
            yield _checked(at_s, int(row["ContextTokens"]), int(row["GeneratedTokens"]))
        except (ValueError, KeyError, TypeError) as error:
            raise _bad_line(path, number, error) from None


def _checked(at_s: float, input_tokens: int, output_tokens: int, hash_ids: tuple[int, ...] = ()) -> TraceRow:
    if not math.isfinite(at_s):
        raise ValueError("the time is no number")
    if not (1 <= input_tokens <= MAX_TRACE_TOKENS and 1 <= output_tokens <= MAX_TRACE_TOKENS):
        raise ValueError(f"lengths must be in [1, {MAX_TRACE_TOKENS}]")
    return TraceRow(at_s, input_tokens, output_tokens, hash_ids)


def _bad_line(path: Path, number: int, error: Exception) -> ConfigError:
    reason = f"no {error}" if isinstance(error, KeyError) else str(error)
    return ConfigError(f"line {number} of the trace {path} is no request: {reason}", field="trace")


# The made-up conversations: one more begins every so often, people answer after a while, a few turns each.
_NEW_EVERY_S, _THINK_S, _MEAN_TURNS = 2.0, 20.0, 3.0
_SYSTEM_BLOCKS, _MEAN_TURN_TOKENS, _MEAN_OUTPUT_TOKENS = 2, 1500.0, 200.0


def made_up(count: int, seed: int) -> list[TraceRow]:
    """Conversations with Mooncake's fields, for where its file is not at hand: `count` requests in order of arrival.

    All share a system prompt of two blocks; every turn repeats its conversation so far and adds new tokens.
    """
    rng = np.random.default_rng(seed)
    rows: list[TraceRow] = []
    began_s = 0.0
    # One conversation after another, and some more: those that begin late may still have early turns.
    while len(rows) < 2 * count:
        began_s += rng.exponential(_NEW_EVERY_S)
        rows += _conversation(began_s, next_block=_SYSTEM_BLOCKS + 1000 * len(rows), rng=rng)
    return sorted(rows, key=lambda row: row.at_s)[:count]


def _conversation(at_s: float, next_block: int, rng: np.random.Generator) -> Iterator[TraceRow]:
    blocks, tokens = list(range(_SYSTEM_BLOCKS)), _SYSTEM_BLOCKS * BLOCK_TOKENS
    for _ in range(int(rng.geometric(1 / _MEAN_TURNS))):
        del blocks[tokens // BLOCK_TOKENS :]  # a block that was not full has another name with more in it
        tokens += 1 + int(rng.exponential(_MEAN_TURN_TOKENS))
        new = -(-tokens // BLOCK_TOKENS) - len(blocks)
        blocks += range(next_block, next_block + new)
        next_block += new
        output = 1 + int(rng.exponential(_MEAN_OUTPUT_TOKENS))
        yield TraceRow(at_s, tokens, output, tuple(blocks))
        tokens += output
        at_s += rng.exponential(_THINK_S)
