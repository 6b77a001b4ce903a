"""The text of one choice: token steps in; tokens, text and the reason of the end out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from router.life.admission import Admitted
from router.life.detokenizer import CleanUp, Detokenizer
from router.life.stop_strings import StopStrings
from router.tokenizer import Tokenizer
from tandem.types import FinishReason, Token


class TokenStep(NamedTuple):
    """What a worker produced for one choice at once; a finish reason marks the last."""

    tokens: tuple[Token, ...]
    finish_reason: FinishReason | None = None


class ChoiceOutput:
    """What the client has been given of one choice.

    open ──finish reason of the worker──▶ ended (reason)
      └────a stop string completes──────▶ ended (STOP, stop names it; later tokens do not exist)
    """

    def __init__(
        self,
        detokenizer: Detokenizer | None,
        stop: Sequence[str],
        min_tokens: int,
        spelled_stop_ids: frozenset[int] = frozenset(),
        unspelled: Mapping[str, int] | None = None,
        clean_up: CleanUp | None = None,
    ) -> None:
        """spelled_stop_ids: tokens whose text is emitted although they end the choice. unspelled: ids by text, of
        tokens whose text is not emitted; stop strings may have it.
        """
        self._detokenizer = detokenizer
        self._clean_up = clean_up
        self._stops = StopStrings(stop, unspelled)
        self._min_tokens = min_tokens
        self._spelled_stop_ids = spelled_stop_ids
        self.tokens = 0
        self.reason: FinishReason | None = None

    @property
    def stop(self) -> str | None:
        return self._stops.matched

    def push(self, steps: Iterable[TokenStep]) -> tuple[tuple[Token, ...], str]:
        """The tokens and the text to emit for these steps."""
        tokens: list[Token] = []
        text = ""
        for step in steps:
            for token in step.tokens:
                ends = step.finish_reason is FinishReason.STOP and token is step.tokens[-1]
                tokens.append(token)
                text += self._spell(token.id, ends)
                if self.stop is not None:
                    self.reason = FinishReason.STOP
                    return tuple(tokens), text
            if step.finish_reason is not None:
                text += self._rest()
                self.reason = step.finish_reason if self.stop is None else FinishReason.STOP
        return tuple(tokens), text

    def _spell(self, token_id: int, ends: bool) -> str:
        self.tokens += 1
        if self._detokenizer is None or (ends and token_id not in self._spelled_stop_ids):
            return ""
        piece = self._detokenizer.push(token_id) + self._stops.marks.get(token_id, "")
        return self._stopped(piece if self._clean_up is None else self._clean_up.push(piece))

    def _rest(self) -> str:
        """What was held back: half a character, what might have been cleaned up, and what began a stop string."""
        piece = "" if self._detokenizer is None else self._detokenizer.flush()
        if self._clean_up is not None:
            piece = self._clean_up.push(piece) + self._clean_up.flush()
        text = self._stopped(piece)
        return text if self.stop is not None else text + self._stops.flush()

    def _stopped(self, piece: str) -> str:
        return self._stops.push(piece, armed=self.tokens > self._min_tokens)


def output_of(admitted: Admitted, tokenizer: Tokenizer | None) -> ChoiceOutput:
    stop, min_tokens = admitted.stop, admitted.sampling.min_tokens
    if tokenizer is None:
        return ChoiceOutput(None, stop, min_tokens)
    keep = admitted.keep_special_tokens
    return ChoiceOutput(
        Detokenizer(tokenizer, admitted.prompt_ids, keep),
        stop,
        min_tokens,
        spelled_stop_ids=frozenset(admitted.model.eos_token_ids) if keep else frozenset(),
        unspelled={} if keep or not stop else tokenizer.special_tokens,
        clean_up=CleanUp(tokenizer.loaded.clean_up_tokenization) if tokenizer.cleans_up else None,
    )
