"""The log probabilities of an answer, one token a row."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tandem.cli.common import printable
from tandem.types import Delta, Token


def show_logprobs(console: Console, deltas: Sequence[Delta]) -> None:
    """A table for each choice.

    The router sends text apart from tokens, and holds it back while a character or a stop string is incomplete: text
    stands in the row of the last token it came with.
    """
    choices = sorted({delta.choice for delta in deltas})
    for choice in choices:
        console.print(f"\nchoice {choice}" if len(choices) > 1 else "")
        console.print(_table([delta for delta in deltas if delta.choice == choice]))


def _table(deltas: Sequence[Delta]) -> Table:
    best = max((len(token.top_logprobs) for delta in deltas for token in delta.tokens), default=0)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for header in ("#", "token", "logprob", "probability"):
        table.add_column(header, justify="right", no_wrap=True)
    for header in ("text", *(["most probable: token logprob"] if best else [])):
        table.add_column(header)
    rows = [(token, delta.text if token is delta.tokens[-1] else "") for delta in deltas for token in delta.tokens]
    for place, (token, text) in enumerate(rows):
        table.add_row(str(place), *_row(token, text, bool(best)))
    return table


def _row(token: Token, text: str, with_best: bool) -> list[str | Text]:
    known = token.logprob is not None
    cells: list[str | Text] = [
        str(token.id),
        f"{token.logprob:.4f}" if known else "-",
        f"{100 * math.exp(token.logprob or 0.0):.2f} %" if known else "-",
        Text(repr(printable(text)) if text else ""),
    ]
    if with_best:
        cells.append(", ".join(f"{id_} {logprob:.4f}" for id_, logprob in token.top_logprobs))
    return cells
