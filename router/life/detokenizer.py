"""Token ids to text, one id at a time, and what is taken out of the text again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

# The last prompt ids that decide how the first output id is spelled (its leading space).
CONTEXT_IDS = 6
# A UTF-8 character has at most 4 bytes, so at most 4 ids: a longer run of ids that spells no text is broken for good.
MAX_PENDING = 8
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
# Signs of an incomplete character at the end of a text: one for all of its bytes, or, in sentencepiece's way, for each.
_MAX_INCOMPLETE = 3
# Characters of the spellings that are replaced (" .", " n't", " 've" and so on): none reaches over any other character.
_INVOLVED = frozenset(" .?!,'ntmsver")


class Decoder(Protocol):
    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of all ids at once."""


class Detokenizer:
    """Spells output ids after a prompt. A character whose bytes are not all there yet waits for them, or for the end.

    The spelling of an id depends on the ids before it, so a short context is decoded with the new ids, and what it does
    not account for is the new text (the way of Text Generation Inference). `tokenizers.DecodeStream` (0.23) is not
    used: given a prompt that ends in half a character it emits prompt text as output, and output bytes that are not
    UTF-8 hold back everything after them.
    """

    def __init__(self, tokenizer: Decoder, prompt_ids: Sequence[int], keep_special_tokens: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip_special = not keep_special_tokens
        # Context, then the ids whose text is not complete.
        self._ids = list(prompt_ids[-CONTEXT_IDS:])
        self._pending = 0
        # Characters of the text of `_ids` that are the prompt's, or have been given.
        self._given = len(self._decode())

    def push(self, token_id: int) -> str:
        """The text that this id completes; empty while a character is incomplete."""
        self._ids.append(token_id)
        self._pending += 1
        now = self._decode()
        incomplete = len(now) - len(now.rstrip(_INCOMPLETE))
        if self._pending >= MAX_PENDING:
            incomplete = min(incomplete, _MAX_INCOMPLETE)
        text = self._take(now, len(now) - incomplete)
        if incomplete == 0 and not text and self._pending == 1:
            # A special token: it spells nothing, and the context before it still decides about the next id.
            self._ids.pop()
            self._pending = 0
        elif incomplete == 0 or self._pending >= MAX_PENDING:
            self._ids = self._ids[-min(self._pending, MAX_PENDING) :]
            self._given = max(0, len(self._decode()) - incomplete)
            self._pending = 0 if incomplete == 0 else MAX_PENDING - 1
        return text

    def flush(self) -> str:
        """What waited for the rest of a character, when there are no more ids."""
        now = self._decode()
        return self._take(now, len(now))

    def _take(self, now: str, end: int) -> str:
        text = now[self._given : end]
        self._given = max(self._given, end)
        return text

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=self._skip_special)


class CleanUp:
    """What transformers takes out of a decoded text (`clean_up_tokenization_spaces`), in a stream of pieces.

    It holds back the end of the text that later pieces may still change.
    """

    def __init__(self, clean: Callable[[str], str]) -> None:
        """clean: of a whole text, transformers' own."""
        self._clean = clean
        self._held = ""

    def push(self, piece: str) -> str:
        """The text that is sure now."""
        sure = next((place for place in range(len(piece), 0, -1) if piece[place - 1] not in _INVOLVED), 0)
        if not sure:
            self._held += piece
            return ""
        text, self._held = self._held + piece[:sure], piece[sure:]
        return self._clean(text)

    def flush(self) -> str:
        """What was held back, when the text has ended."""
        text, self._held = self._held, ""
        return self._clean(text)
