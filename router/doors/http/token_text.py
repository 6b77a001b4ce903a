"""How single tokens are spelled, for log probabilities. A token may hold a part of a character only."""

from __future__ import annotations

import re
from functools import lru_cache

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def _byte_letters() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the others for 256 and up, in order."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    letters = {chr(byte): byte for byte in own} | {chr(256 + place): byte for place, byte in enumerate(others)}
    assert set(letters) == set(ByteLevel.alphabet())
    return letters


class TokenText:
    """The text of one token by itself, and its bytes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._letters = _byte_letters()
        self.of = lru_cache(maxsize=1 << 16)(self._of)

    def _of(self, token_id: int) -> tuple[str, bytes]:
        """Where the bytes are no text, the text is `bytes:\\xe2\\x80`, as OpenAI writes it."""
        name = self._tokenizer.id_to_token(token_id)
        text = str(self._tokenizer.decode([token_id], skip_special_tokens=False))
        if name is None or "\N{REPLACEMENT CHARACTER}" not in text:
            # sentencepiece's decoder takes the space in front of a text away.
            text = f" {text}" if name and name.startswith(_SPACE) and not text.startswith(" ") else text
            return text, text.encode()
        data = self._bytes(name)
        try:
            return data.decode(), data
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), data

    def _bytes(self, name: str) -> bytes:
        if match := _BYTE_TOKEN.fullmatch(name):
            return bytes.fromhex(match[1])
        if all(letter in self._letters for letter in name):
            return bytes(self._letters[letter] for letter in name)
        return name.encode()
