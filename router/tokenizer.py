"""The served model's tokenizer, for text prompts and text answers. A model without one is served by token ids."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from tandem.config import ModelConfig
from tandem.errors import ConfigError, InvalidRequest
from tandem.hub import source_of

log = logging.getLogger(__name__)

# Encoding runs at about a million characters a second: longer texts would hold the event loop for over 10 ms.
INLINE_CHARS = 10_000


def load_tokenizer(model: ModelConfig) -> Tokenizer | None:
    """None when the model has no tokenizer. Raises ConfigError for a model that is not there, or cannot be read."""
    source = source_of(model.path)
    directory = Path(source)
    if not directory.is_dir():
        return _from_hub(source)
    file = directory / "tokenizer.json"
    if not file.exists():
        log.warning("no tokenizer.json in %s: prompts must be token ids, and answers carry no text", directory)
        return None
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more precise
        raise ConfigError(f"cannot read {file}: {error}", field="model.path") from None


def _from_hub(name: str) -> Tokenizer | None:
    try:
        return Tokenizer.from_pretrained(name)
    except Exception as error:  # the library raises nothing more precise
        log.warning("no tokenizer of %s: prompts must be token ids, and answers carry no text (%s)", name, error)
        return None


class Encoder:
    """Text to token ids, unless it is longer than any prompt can be: that is known before it is looked at."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._most_bytes = most_bytes_of_a_token(tokenizer)

    async def encode(self, text: str, limit: int, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids, with the special tokens that the model expects around a prompt, unless the text has them.

        limit: tokens, of the model. Raises InvalidRequest for a text that must have more; one that merely has more is
        the caller's to refuse.
        """
        if len(text) <= INLINE_CHARS:
            return tuple(self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
        if self._most_bytes is not None and (size := len(text.encode())) > self._most_bytes * limit:
            words = f"the prompt has {size} bytes, which are more tokens than the model's limit of {limit}"
            raise InvalidRequest(words, field="prompt")
        # The batch call releases the interpreter's lock while it works; the single one may not.
        encode = self.tokenizer.encode_batch
        (encoding,) = await asyncio.to_thread(encode, [text], add_special_tokens=add_special_tokens)
        return tuple(encoding.ids)


# Of the steps that cut a text into pieces, those that leave all of it there.
_KEEPING = {"Digits", "ByteLevel"}


def most_bytes_of_a_token(tokenizer: Tokenizer) -> int | None:
    """No token stands for more bytes of text; None where that is not known.

    It is of byte-level BPE that changes nothing before it cuts, knows every byte, and has no added token that swallows
    the blanks around it: there each byte of the text is in exactly one token.
    """
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
