"""Token ids to text, one id at a time."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

# The last prompt ids that decide how the first output id is spelled (its leading space).
CONTEXT_IDS = 6
# A UTF-8 character has at most 4 bytes, so at most 4 ids: a longer run of ids that spells no text is broken for good.
MAX_PENDING = 8
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """Spells output ids after a prompt. A character whose bytes are not all there yet is never emitted.

    The spelling of an id depends on the ids before it, so a short context is decoded twice, with and without the new
    ids, and the difference is the new text (the way of Text Generation Inference). `tokenizers.DecodeStream` (0.23) is
    not used: given a prompt that ends in half a character it emits prompt text as output, and output bytes that are
    not UTF-8 hold back everything after them.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], keep_special_tokens: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip_special = not keep_special_tokens
        # Context, then the ids whose text is still incomplete.
        self._ids = list(prompt_ids[-CONTEXT_IDS:])
        self._context = len(self._ids)

    def push(self, token_id: int) -> str:
        """The text that this id completes; empty while a character is incomplete."""
        self._ids.append(token_id)
        before, now = self._decode(self._ids[: self._context]), self._decode(self._ids)
        pending = len(self._ids) - self._context
        if now.endswith(_INCOMPLETE) and pending < MAX_PENDING:
            return ""
        text = now[len(before) :]
        if not text and pending == 1:
            # A special token: it spells nothing, and the context before it still decides about the next id.
            self._ids.pop()
            return ""
        self._ids = self._ids[self._context :]
        self._context = len(self._ids)
        return text

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=self._skip_special))
