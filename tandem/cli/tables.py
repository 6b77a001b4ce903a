"""What an answer tells besides its text: where its time went, and the log probabilities of its tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tandem.cli.console import human_bytes, printable
from tandem.timeline import Phase
from tandem.types import Delta, RequestReport, Token

BAR_CHARS = 24


@dataclass(frozen=True)
class PhaseSpan:
    name: str
    start_ms: float
    end_ms: float
    note: str

    @property
    def ms(self) -> float:
        return self.end_ms - self.start_ms


def spans(report: RequestReport, output_tokens: int) -> list[PhaseSpan]:
    """The parts of a request's life, end to end: they add up to its whole. Parts it never reached are left out."""
    marks = report.timeline.marks
    decode_from = Phase.KV_SEALED if Phase.KV_SEALED in marks else Phase.FIRST_TOKEN
    handoff = "a block table" if report.transport == "local" else "KV transfer that prefill did not hide"
    wanted = [
        ("queued", Phase.RECEIVED, Phase.PREFILL_STARTED, "admission, reservation, the prefill worker's queue"),
        ("prefill", Phase.PREFILL_STARTED, Phase.FIRST_TOKEN, f"on {report.prefill_worker}; samples the first token"),
        ("handoff", Phase.FIRST_TOKEN, Phase.KV_SEALED, handoff),
        ("decode", decode_from, Phase.FINISHED, _decode_note(report, output_tokens, decode_from)),
    ]
    return [
        PhaseSpan(name, marks[start], marks[end], note)
        for name, start, end, note in wanted
        if start in marks and end in marks
    ]


def _decode_note(report: RequestReport, output_tokens: int, start: Phase) -> str:
    ms, tokens = report.timeline.between_ms(start, Phase.FINISHED), output_tokens - 1
    if ms is None or tokens < 1:
        return "nothing left to decode"
    return f"on {report.decode_worker}; {ms / tokens:.1f} ms per token × {tokens}"


def timeline_table(report: RequestReport, output_tokens: int) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    parts = spans(report, output_tokens)
    total_ms = max((part.end_ms for part in parts), default=0.0)
    for column in ("where", "ms", "when", "note"):
        table.add_column(column, justify="right" if column == "ms" else "left", no_wrap=column != "note")
    for part in parts:
        table.add_row(part.name, f"{part.ms:.1f} ms", _bar(part, total_ms), Text(part.note, style="dim"))
    table.add_row("total", f"{total_ms:.1f} ms", "", "", style="bold")
    return table


def _bar(part: PhaseSpan, total_ms: float) -> Text:
    """The part's place within the whole."""
    if total_ms <= 0:
        return Text("")
    start = round(BAR_CHARS * part.start_ms / total_ms)
    length = max(1, round(BAR_CHARS * part.end_ms / total_ms) - start)
    return Text(" " * min(start, BAR_CHARS - 1) + "━" * length, style="cyan")


def transfer_line(report: RequestReport) -> str:
    """What crossed between the workers, in one sentence."""
    if report.transport == "local":
        return "KV moved: none; one worker played both roles, and a block table changed hands"
    if not report.kv_frames:
        return "KV moved: none; the answer ended, or was cached, before there was anything to hand off"
    hidden = f"{report.kv_hidden_ms / report.kv_transfer_ms:.0%} of it" if report.kv_transfer_ms else "none"
    reused = f"; {report.kv_reused_tokens} prompt tokens were already there" if report.kv_reused_tokens else ""
    return (
        f"KV moved: {human_bytes(report.kv_bytes)} in {report.kv_frames} frame{'s' * (report.kv_frames != 1)} "
        f"over {report.transport} in {report.kv_transfer_ms:.1f} ms, {hidden} while prefill still ran{reused}"
    )


def show_logprobs(console: Console, deltas: Sequence[Delta]) -> None:
    """A table for each choice.

    The router sends text apart from tokens, and holds it back while a character or a stop string is incomplete: text
    stands in the row of the last token it came with.
    """
    choices = sorted({delta.choice for delta in deltas})
    for choice in choices:
        console.print(f"\nchoice {choice}" if len(choices) > 1 else "")
        console.print(_logprob_table([delta for delta in deltas if delta.choice == choice]))


def _logprob_table(deltas: Sequence[Delta]) -> Table:
    best = max((len(token.top_logprobs) for delta in deltas for token in delta.tokens), default=0)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for header in ("#", "token", "logprob", "probability"):
        table.add_column(header, justify="right", no_wrap=True)
    for header in ("text", *(["most probable: token logprob"] if best else [])):
        table.add_column(header)
    rows = [(token, delta.text if token is delta.tokens[-1] else "") for delta in deltas for token in delta.tokens]
    for place, (token, text) in enumerate(rows):
        table.add_row(str(place), *_logprob_row(token, text, bool(best)))
    return table


def _logprob_row(token: Token, text: str, with_best: bool) -> list[str | Text]:
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
