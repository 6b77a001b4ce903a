"""`tandem generate`: one prompt, its answer as it comes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Protocol

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from tandem.cli.console import make_console, printable, reported
from tandem.cli.options import RouterOption
from tandem.cli.tables import show_logprobs, timeline_table, transfer_line
from tandem.client import Client, Generation, SamplingFields
from tandem.client.request import DEFAULT_ADDRESS
from tandem.errors import InvalidRequest
from tandem.process.entry import INTERRUPTED
from tandem.types import ChoiceFinished, Completed, Delta, Usage


class AnswerWriter(Protocol):
    """Shows deltas as they come."""

    def show_delta(self, delta: Delta) -> None: ...
    def show_end(self) -> None: ...


class OneChoice:
    """Plain text, straight through."""

    def __init__(self, on_terminal: bool) -> None:
        self._clean = printable if on_terminal else str
        self._began = False

    def show_delta(self, delta: Delta) -> None:
        self._began = True
        sys.stdout.write(self._clean(delta.text))
        sys.stdout.flush()

    def show_end(self) -> None:
        if self._began:
            sys.stdout.write("\n")
            sys.stdout.flush()


class ManyChoices:
    """Several answers at once, each below its label: redrawn on a terminal, printed at the end elsewhere."""

    def __init__(self, console: Console, count: int) -> None:
        self._console = console
        self._texts = [""] * count
        self._live = Live(console=console, refresh_per_second=12, vertical_overflow="visible")
        if console.is_terminal:
            self._live.start()

    def show_delta(self, delta: Delta) -> None:
        self._texts[delta.choice] += printable(delta.text)
        if self._console.is_terminal:
            self._live.update(self._view())

    def show_end(self) -> None:
        if self._console.is_terminal:
            self._live.update(self._view(), refresh=True)
            self._live.stop()
        elif any(self._texts):
            typer.echo(self._view().plain)

    def _view(self) -> Text:
        parts = [(f"[{index}]", text) for index, text in enumerate(self._texts)]
        return Text("\n").join(Text.assemble((label, "bold cyan"), text) for label, text in parts)


@dataclass
class StreamedAnswer:
    deltas: list[Delta] = field(default_factory=list)
    finished: list[ChoiceFinished] = field(default_factory=list)
    usage: Usage = field(default_factory=lambda: Usage(0, 0))


def show(answer: Generation, writer: AnswerWriter) -> StreamedAnswer:
    """Streams an answer through a writer. Raises TandemError."""
    outcome = StreamedAnswer()
    try:
        for event in answer:
            match event:
                case Delta():
                    outcome.deltas.append(event)
                    writer.show_delta(event)
                case ChoiceFinished():
                    outcome.finished.append(event)
                case Completed():
                    outcome.usage = event.usage
    finally:
        writer.show_end()
    return outcome


def show_timelines(console: Console, outcome: StreamedAnswer) -> None:
    for choice in sorted(outcome.finished, key=lambda choice: choice.choice):
        label = f"choice {choice.choice}: " if len(outcome.finished) > 1 else ""
        console.print(f"\n[dim]{label}{choice.output_tokens} tokens, ended by {choice.reason}[/dim]")
        console.print(timeline_table(choice.report, choice.output_tokens))
        console.print(transfer_line(choice.report), markup=False)
    usage = outcome.usage
    console.print(
        f"prompt {usage.prompt_tokens} tokens ({usage.cached_prompt_tokens} cached), output {usage.output_tokens}"
    )


# Options that the SDK has another name for.
_OPTIONS = {"timeout_s": "timeout", "stop_token_ids": "stop-token-id"}


@contextmanager
def as_typed() -> Iterator[None]:
    """In what the SDK refuses, an option has the name that it was typed by."""
    try:
        yield
    except InvalidRequest as error:
        if error.field in (None, "prompt") or not error.message.startswith(f"{error.field} "):
            raise
        option = "--" + _OPTIONS.get(error.field, error.field).replace("_", "-")
        raise InvalidRequest(option + error.message.removeprefix(error.field), field=error.field) from None


def parse_bias(entries: list[str]) -> dict[int, float]:
    """From ID:BIAS strings. Raises InvalidRequest."""
    try:
        return {int(token): float(bias) for token, _, bias in (entry.partition(":") for entry in entries)}
    except ValueError:
        raise InvalidRequest("--logit-bias takes ID:BIAS, such as 42:-1.5", field="logit_bias") from None


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen, and which of them end an answer."""

    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 128
    min_tokens: Annotated[int, typer.Option(help="Stop conditions are ignored for this many tokens.")] = 0
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0
    top_k: Annotated[int, typer.Option(help="Keep the k most probable tokens; 0 keeps all.")] = 0
    top_p: Annotated[float, typer.Option(help="Keep tokens up to this probability in all.")] = 1.0
    min_p: Annotated[float, typer.Option(help="Keep tokens this probable relative to the best.")] = 0.0
    repetition_penalty: Annotated[float, typer.Option(help="1 is off.")] = 1.0
    presence_penalty: Annotated[float, typer.Option(help="0 is off.")] = 0.0
    frequency_penalty: Annotated[float, typer.Option(help="0 is off.")] = 0.0
    logit_bias: Annotated[list[str] | None, typer.Option(metavar="ID:BIAS", help="May be repeated.")] = None
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answer.")] = None
    stop_token_id: Annotated[list[int] | None, typer.Option(help="End after this token; may be repeated.")] = None
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end of sequence.")] = False
    logprobs: Annotated[
        int | None, typer.Option(metavar="K", help="Show log probabilities, and of the K best tokens, on stderr.")
    ] = None

    def fields(self) -> SamplingFields:
        """Raises InvalidRequest."""
        return SamplingFields(
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=parse_bias(self.logit_bias or []),
            seed=self.seed,
            stop_token_ids=tuple(self.stop_token_id or ()),
            ignore_eos=self.ignore_eos,
            logprobs=self.logprobs,
        )


@dataclass(frozen=True)
class AnswerOptions:
    """What is asked of the service besides."""

    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None
    keep_special_tokens: Annotated[bool, typer.Option("--keep-special-tokens", help="Show their text too.")] = False
    n: Annotated[int, typer.Option("--n", "-n", help="Independent answers.")] = 1
    model: Annotated[str, typer.Option(help="Must be the served model's name, if given.")] = ""
    cache_salt: Annotated[str, typer.Option(help="Share cached prefixes only with the same salt.")] = ""
    timeout: Annotated[float | None, typer.Option(metavar="SECONDS", help="The deadline.")] = None

    def ask(self, client: Client, prompt: str, sampling: SamplingFields) -> Generation:
        """Raises InvalidRequest."""
        return client.generate(
            prompt,
            n=self.n,
            stop=self.stop or (),
            model=self.model,
            cache_salt=self.cache_salt,
            keep_special_tokens=self.keep_special_tokens,
            timeout_s=self.timeout,
            **sampling,
        )


def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.")],
    sampling: SamplingOptions,
    options: AnswerOptions,
    router: RouterOption = DEFAULT_ADDRESS,
    timeline: Annotated[bool, typer.Option(help="Show where the time went, on stderr.")] = False,
) -> None:
    """Generate from a prompt and print the text as it arrives. Ctrl-C cancels."""
    with reported(), Client(router) as client:
        with as_typed():
            fields = sampling.fields()
            answer = options.ask(client, _from_stdin() if prompt == "-" else prompt, fields)
        writer = OneChoice(sys.stdout.isatty()) if options.n == 1 else ManyChoices(make_console(), options.n)
        try:
            outcome = show(answer, writer)
        except KeyboardInterrupt:
            typer.echo("tandem: cancelled", err=True)
            raise typer.Exit(INTERRUPTED) from None
        if sampling.logprobs is not None:
            show_logprobs(make_console(stderr=True), outcome.deltas)
        if timeline:
            show_timelines(make_console(stderr=True), outcome)


def _from_stdin() -> str:
    """UTF-8 in any locale. Without the newline that `echo` ends its text with: a model would answer to it."""
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except OSError as error:
        reason = error.strerror
    except UnicodeDecodeError as error:
        reason = f"it is not valid UTF-8 at byte {error.start}"
    raise InvalidRequest(f"cannot read the prompt from standard input: {reason}", field="prompt")
