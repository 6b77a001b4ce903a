"""Events put together: what `complete` returns, and the check that a stream ended as the contract says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from tandem import wire
from tandem.errors import InternalError
from tandem.types import Accepted, ChoiceFinished, Completed, Delta, Event, FinishReason, RequestReport, Token, Usage
from tandem.v1 import generation_pb2


@dataclass(frozen=True)
class Choice:
    """One whole answer."""

    index: int
    text: str
    tokens: tuple[Token, ...]
    reason: FinishReason
    report: RequestReport
    # The stop string that ended it, if one did.
    stop: str | None = None


@dataclass(frozen=True)
class Completion:
    request_id: str
    # In the order of their indices.
    choices: tuple[Choice, ...]
    usage: Usage

    @property
    def text(self) -> str:
        """The first choice's."""
        return self.choices[0].text


class EventReader:
    """Turns the messages of one call into events and knows whether the last one came."""

    def __init__(self) -> None:
        self._completed = False

    def read_event(self, message: generation_pb2.GenerateEvent) -> Event:
        event = wire.event_from_wire(message)
        self._completed = isinstance(event, Completed)
        return event

    def check_ended(self) -> None:
        """Raises InternalError when the stream stopped, without an error, before its last event."""
        if not self._completed:
            raise InternalError("the router ended the answer before its last event")


@dataclass
class _ChoiceParts:
    text: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)


class Collector:
    """Feed it every event of one call; then `completion()` has the whole."""

    def __init__(self) -> None:
        self._accepted = Accepted("", 0)
        self._parts: dict[int, _ChoiceParts] = {}
        self._choices: dict[int, Choice] = {}
        self._usage = Usage(0, 0)

    def add_event(self, event: Event) -> None:
        match event:
            case Accepted():
                self._accepted = event
            case Delta():
                parts = self._parts.setdefault(event.choice, _ChoiceParts())
                parts.text.append(event.text)
                parts.tokens.extend(event.tokens)
            case ChoiceFinished():
                parts = self._parts.get(event.choice, _ChoiceParts())
                text, tokens = "".join(parts.text), tuple(parts.tokens)
                choice = Choice(event.choice, text, tokens, event.reason, event.report, stop=event.stop)
                self._choices[event.choice] = choice
            case Completed():
                self._usage = event.usage

    def completion(self) -> Completion:
        choices = tuple(self._choices[index] for index in sorted(self._choices))
        return Completion(self._accepted.request_id, choices, self._usage)


def collect(events: Iterable[Event]) -> Completion:
    collector = Collector()
    for event in events:
        collector.add_event(event)
    return collector.completion()
