"""What transformers takes out of a decoded text (`clean_up_tokenization_spaces`), in a stream of pieces."""

from __future__ import annotations

from collections.abc import Callable

# Characters of the spellings that are replaced (" .", " n't", " 've" and so on): none reaches over any other character.
_INVOLVED = frozenset(" .?!,'ntmsver")


class CleanUp:
    """Holds back the end of the text that later pieces may still change."""

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
