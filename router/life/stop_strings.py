"""Stop strings in a stream of text pieces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# Code points that no text has: each can stand for a special token.
_FIRST_MARK = 0xD800


class StopStrings:
    """Lets text through until a stop string is complete, and holds back what may become one.

        streaming ──a stop string completes──▶ stopped (matched says which)

    The string that completes first wins; of those that complete at the same character, the longest. So the result
    does not depend on how the text was cut into pieces.
    """

    def __init__(self, strings: Sequence[str], special_tokens: Mapping[str, int] | None = None) -> None:
        """special_tokens: ids by text, of those that are not spelled; where a stop string has one of these texts, the
        token counts as its text, if the pieces have its mark.
        """
        named = [text for text in special_tokens or () if any(text in string for string in strings)]
        marked = {text: chr(_FIRST_MARK + place) for place, text in enumerate(sorted(named, key=len, reverse=True))}
        # By token id, what stands in a piece for the token.
        self.marks = {(special_tokens or {})[text]: mark for text, mark in marked.items()}
        # As they may be in the pieces → as the caller wrote them.
        self._strings = {string: string for string in strings}
        for string in strings:
            form = string
            for text, mark in marked.items():
                form = form.replace(text, mark)
            self._strings[form] = string
        self._unmarked = dict.fromkeys(map(ord, self.marks.values()))
        # Text not let through yet: the longest end of the text so far that begins a stop string.
        self._held = ""
        self.matched: str | None = None

    def push(self, piece: str, armed: bool = True) -> str:
        """The text that is now sure to precede any stop string, without marks. While not armed, complete strings do
        not count.
        """
        return self._push(piece, armed).translate(self._unmarked)

    def _push(self, piece: str, armed: bool) -> str:
        if not self._strings:
            return piece
        text = self._held + piece
        match = self._first_match(text) if armed else None
        if match is not None:
            end, length = match
            self.matched, self._held = self._strings[text[end - length : end]], ""
            return text[: end - length]
        held = self._held_length(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What was held back, when the text ends without a match."""
        held, self._held = self._held, ""
        return held.translate(self._unmarked)

    def _first_match(self, text: str) -> tuple[int, int] | None:
        """(end, length) of the winner among matches that end in the new piece: older ones were not armed."""
        old = len(self._held)
        found = [
            (start + len(string), -len(string))
            for string in self._strings
            if (start := text.find(string, max(0, old - len(string) + 1))) >= 0
        ]
        if not found:
            return None
        end, negative_length = min(found)
        return end, -negative_length

    def _held_length(self, text: str) -> int:
        longest = max(map(len, self._strings), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(len(string) > length and string.startswith(text[-length:]) for string in self._strings):
                return length
        return 0
