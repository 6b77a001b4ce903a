"""How single tokens are spelled for log probabilities."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models

from router.doors.http.token_text import TokenText
from tandem.config import TINY_MODEL

TINY = Tokenizer.from_file(str(TINY_MODEL / "tokenizer.json"))


@pytest.mark.parametrize("text", [" can vary", "naïve", "日本語", "🙂 ok", "\t\n"])
def test_the_bytes_of_all_tokens_are_those_of_the_text(text: str) -> None:
    ids = TINY.encode(text, add_special_tokens=False).ids
    spelled = [TokenText(TINY).of(token) for token in ids]
    assert b"".join(data for _, data in spelled) == text.encode()
    for name, data in spelled:
        if not name.startswith("bytes:"):
            assert name.encode() == data


def test_half_a_character_is_written_as_bytes() -> None:
    ids = TINY.encode("🙂", add_special_tokens=False).ids
    assert len(ids) > 1
    assert TokenText(TINY).of(ids[0])[0].startswith("bytes:\\xf0")


def test_sentencepiece_s_spaces_and_bytes() -> None:
    vocabulary = {"<unk>": 0, "▁the": 1, "<0xE2>": 2, "<0x41>": 3}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    spell = TokenText(tokenizer)
    assert spell.of(1) == (" the", b" the")
    assert spell.of(2) == ("bytes:\\xe2", b"\xe2")
    assert spell.of(3) == ("A", b"A")


def test_an_id_that_the_tokenizer_does_not_know() -> None:
    assert TokenText(TINY).of(10**6) == ("", b"")
