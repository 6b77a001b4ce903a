"""Events of the orchestrator to OpenAI's objects. Each endpoint has its own shapes; the way there is the same."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from router.doors.http.token_text import TokenText
from tandem.timeline import Phase
from tandem.types import ChoiceFinished, Delta, RequestReport, Token, Usage

# What a user sees of where the time went: name → from which phase to which.
SPANS: dict[str, tuple[Phase, Phase]] = {
    "queue_ms": (Phase.RECEIVED, Phase.PREFILL_STARTED),
    "prefill_ms": (Phase.PREFILL_STARTED, Phase.FIRST_TOKEN),
    "handoff_ms": (Phase.FIRST_TOKEN, Phase.KV_SEALED),
    "first_decode_ms": (Phase.KV_SEALED, Phase.DECODE_STARTED),
    "decode_ms": (Phase.DECODE_STARTED, Phase.FINISHED),
    "ttft_ms": (Phase.RECEIVED, Phase.FIRST_TOKEN),
    "total_ms": (Phase.RECEIVED, Phase.FINISHED),
}
# OpenAI's, for what is as good as impossible: JSON has no infinity.
LEAST_LOGPROB = -9999.0


@dataclass
class ChoiceProgress:
    """What one choice has told so far."""

    text: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    # Characters of token texts before the next one, for completions' text_offset.
    offset: int = 0
    # So far; the prompt's, once it is accepted.
    prompt_tokens: int = 0
    output_tokens: int = 0
    # Once both pools are released.
    finished: ChoiceFinished | None = None


class AnswerShape(Protocol):
    """One endpoint's objects."""

    prefix: str
    whole: str
    piece: str

    def choice(self, progress: ChoiceProgress) -> dict[str, Any]:
        """The object of a whole answer, without index and reason."""

    def delta(self, progress: ChoiceProgress, text: str, tokens: tuple[Token, ...]) -> dict[str, Any]:
        """As `choice`, of what is new in a stream."""


class CompletionShape:
    prefix, whole, piece = "cmpl", "text_completion", "text_completion"

    def __init__(self, spell: TokenText | None, logprobs: bool) -> None:
        self._spell = spell
        self._logprobs = logprobs

    def choice(self, progress: ChoiceProgress) -> dict[str, Any]:
        return {"text": "".join(progress.text), "logprobs": self._lists(progress, progress.tokens)}

    def delta(self, progress: ChoiceProgress, text: str, tokens: tuple[Token, ...]) -> dict[str, Any]:
        return {"text": text, "logprobs": self._lists(progress, tokens)}

    def _lists(self, progress: ChoiceProgress, tokens: Iterable[Token]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        texts, offsets = [], []
        for token in tokens:
            texts.append(spelled(self._spell, token.id)[0])
            offsets.append(progress.offset)
            progress.offset += len(texts[-1])
        return {
            "tokens": texts,
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": offsets,
        }

    def _top(self, token: Token) -> dict[str, float | None]:
        """Best first; of two tokens that are spelled alike, the likelier one."""
        found: dict[str, float | None] = {}
        for token_id, logprob in token.top_logprobs:
            found.setdefault(spelled(self._spell, token_id)[0], _finite(logprob))
        return found


class ChatShape:
    prefix, whole, piece = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, spell: TokenText | None, logprobs: bool) -> None:
        self._spell = spell
        self._logprobs = logprobs

    def choice(self, progress: ChoiceProgress) -> dict[str, Any]:
        message = {"role": "assistant", "content": "".join(progress.text), "refusal": None}
        return {"message": message, "logprobs": self._list(progress.tokens)}

    def delta(self, progress: ChoiceProgress, text: str, tokens: tuple[Token, ...]) -> dict[str, Any]:
        delta = {"content": text} if progress.tokens else {"role": "assistant", "content": text}
        return {"delta": delta, "logprobs": self._list(tokens)}

    def _list(self, tokens: Iterable[Token]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        entries = [
            {**self._entry(token.id, token.logprob), "top_logprobs": [self._entry(*top) for top in token.top_logprobs]}
            for token in tokens
        ]
        return {"content": entries, "refusal": None}

    def _entry(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        text, data = spelled(self._spell, token_id)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(data)}


def _finite(logprob: float | None) -> float | None:
    return logprob if logprob is None or logprob > LEAST_LOGPROB else LEAST_LOGPROB


def spelled(spell: TokenText | None, token_id: int) -> tuple[str, bytes]:
    """A model without a tokenizer has numbers only."""
    if spell is None:
        return f"token_id:{token_id}", b""
    return spell.of(token_id)


@dataclass
class OpenAIAnswer:
    """All of one body's choices, in order: those of the first prompt, of the second, and so on."""

    shape: AnswerShape
    model: str
    id: str
    token_ids: bool
    choices: list[ChoiceProgress]
    usages: list[Usage] = field(default_factory=list)
    created: int = field(default_factory=lambda: int(time.time()))

    def note(self, index: int, event: Delta) -> None:
        """For the whole answer."""
        self.choices[index].text.append(event.text)
        self.choices[index].tokens.extend(event.tokens)

    def finish(self, index: int, event: ChoiceFinished) -> None:
        self.choices[index].finished = event

    def chunk(self, index: int, event: Delta) -> dict[str, Any]:
        """For a stream: what is new in this event."""
        progress = self.choices[index]
        choice = {"index": index, **self.shape.delta(progress, event.text, event.tokens), **_ending(event)}
        if self.token_ids:
            choice["token_ids"] = [token.id for token in event.tokens]
        progress.output_tokens += len(event.tokens)
        progress.tokens = progress.tokens or list(event.tokens)  # a stream keeps nothing but that it has begun
        return self._object(self.shape.piece, [choice])

    def usage_so_far(self, index: int) -> dict[str, int]:
        """One choice's, in a stream."""
        prompt, output = self.choices[index].prompt_tokens, self.choices[index].output_tokens
        return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}

    def usage_chunk(self) -> dict[str, Any]:
        return {**self._object(self.shape.piece, []), "usage": self.usage()}

    def object(self) -> dict[str, Any]:
        choices = []
        for index, progress in enumerate(self.choices):
            choice = {"index": index, **self.shape.choice(progress), **_ending(_finished(progress))}
            if self.token_ids:
                choice["token_ids"] = [token.id for token in progress.tokens]
            choices.append(choice)
        return {**self._object(self.shape.whole, choices), "usage": self.usage()}

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def usage(self) -> dict[str, Any]:
        """Sums over all prompts and choices; where the time went is told of the first."""
        prompt = sum(usage.prompt_tokens for usage in self.usages)
        output = sum(usage.output_tokens for usage in self.usages)
        cached = sum(usage.cached_prompt_tokens for usage in self.usages)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
            "prompt_tokens_details": {"cached_tokens": cached},
            "tandem": time_table(_finished(self.choices[0]).report),
        }


def _finished(progress: ChoiceProgress) -> ChoiceFinished:
    assert progress.finished is not None, "every choice has ended"
    return progress.finished


def _ending(event: Delta | ChoiceFinished) -> dict[str, Any]:
    if event.reason is None:
        return {"finish_reason": None}
    return {"finish_reason": str(event.reason), "stop_reason": event.stop}


def time_table(report: RequestReport) -> dict[str, Any]:
    """Milliseconds by span (null for a phase that there was not: one token needs no handoff), and what KV took."""
    spans = {name: report.timeline.between_ms(*phases) for name, phases in SPANS.items()}
    return {
        **{name: None if span is None else round(span, 3) for name, span in spans.items()},
        "kv_bytes": report.kv_bytes,
        "kv_transfer_ms": round(report.kv_transfer_ms, 3),
        "kv_hidden_ms": round(report.kv_hidden_ms, 3),
        "kv_reused_tokens": report.kv_reused_tokens,
        "transport": report.transport,
    }
