"""The served model's tokenizer as the router uses it: prompts to token ids, token ids to text."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any

from tandem.errors import InvalidRequest

# Encoding runs at about a million characters a second: longer texts would hold the event loop for over 10 ms.
INLINE_CHARS = 10_000


class Tokenizer:
    """transformers' tokenizer, whose own code encodes and renders; a token is decoded without that code's detours."""

    def __init__(self, loaded: Any) -> None:
        """loaded: what tandem.tokenizer.load_tokenizer returns, not None."""
        from transformers import PreTrainedTokenizerFast

        self.loaded = loaded
        # tokenizers.Tokenizer; transformers sets it up anew for a first encoding (what tokenizer.json says of
        # truncation and padding does not hold), and leaves it alone after that.
        self.backend = loaded.backend_tokenizer
        loaded("")
        self._most_bytes = most_bytes_of_a_token(self.backend)
        kind = type(loaded)
        # A class with an encoding of its own may change the backend while it works, so it does one text at a time.
        self._turn = nullcontext() if kind._encode_plus is PreTrainedTokenizerFast._encode_plus else asyncio.Lock()
        stock = (kind.decode, kind._decode) == (PreTrainedTokenizerFast.decode, PreTrainedTokenizerFast._decode)
        # Ids to text, without any cleaning up, which is not for parts of a text.
        self.decode: Callable[..., str] = self.backend.decode if stock else self._decode_by_class
        model = type(self.backend.model).__name__
        forced = loaded.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output
        # Whether transformers takes blanks out of what it decoded, as in " ." and " n't".
        self.cleans_up = bool(loaded.clean_up_tokenization_spaces) and (model != "BPE" or bool(forced))

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Ids by text, of tokens that are no text of an answer."""
        found = self.loaded.added_tokens_decoder
        return {token.content: token_id for token_id, token in found.items() if token.special}

    async def encode(self, text: str, limit: int, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids, with the special tokens that the model expects around a prompt, unless the text has them.

        limit: tokens, of the model. Raises InvalidRequest for a text that must have more; one that merely has more is
        the caller's to refuse.
        """
        if len(text) > INLINE_CHARS and self._most_bytes is not None:
            size = len(text.encode())
            if size > self._most_bytes * limit:
                words = f"the prompt has {size} bytes, which are more tokens than the model's limit of {limit}"
                raise InvalidRequest(words, field="prompt")
        async with self._turn:
            if len(text) <= INLINE_CHARS:
                return self._encode(text, add_special_tokens)
            # The library releases the interpreter's lock while it works.
            return await asyncio.to_thread(self._encode, text, add_special_tokens)

    def _encode(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        try:
            found = self.loaded(
                text,
                add_special_tokens=add_special_tokens,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
        except ValueError as error:  # of a class with rules of its own
            raise InvalidRequest(f"the model's tokenizer does not take this text: {error}", field="prompt") from None
        return tuple(found["input_ids"])

    def _decode_by_class(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        found = self.loaded.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
        return str(found)


# Steps that cut a text into pieces and leave all of it there.
_KEEPING = {"Digits", "ByteLevel"}


def most_bytes_of_a_token(tokenizer: Any) -> int | None:
    """No token stands for more bytes of text; None where that is not known. tokenizer: a tokenizers.Tokenizer.

    It is of byte-level BPE that changes nothing before it cuts, knows every byte, and has no added token that swallows
    the blanks around it: there each byte of the text is in exactly one token.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    state = json.loads(tokenizer.to_str())
    model, cutting = state["model"], state["pre_tokenizer"] or {}
    steps = cutting["pretokenizers"] if cutting.get("type") == "Sequence" else [cutting]
    sound = (
        model["type"] == "BPE"
        and not (model["continuing_subword_prefix"] or model["end_of_word_suffix"])
        and model["vocab"].keys() >= set(ByteLevel.alphabet())
        and state["normalizer"] is None
        and state["truncation"] is None
        and [step.get("type") for step in steps].count("ByteLevel") == 1
        and all(
            step["type"] in _KEEPING or (step["type"], step.get("behavior")) == ("Split", "Isolated") for step in steps
        )
        and not any(token["lstrip"] or token["rstrip"] for token in state["added_tokens"])
    )
    if not sound:
        return None
    # In a byte-level vocabulary each byte is written as one character.
    added = (len(token["content"].encode()) for token in state["added_tokens"])
    return max(max(map(len, model["vocab"])), max(added, default=0))
