"""The served model's tokenizer, for text prompts and text answers. A model without one is served by token ids."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from tokenizers import Tokenizer

from tandem.config import ModelConfig
from tandem.errors import ConfigError
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


async def encode(tokenizer: Tokenizer, text: str, add_special_tokens: bool = True) -> tuple[int, ...]:
    """Token ids, with the special tokens that the model expects around a prompt, unless the text has them."""
    if len(text) <= INLINE_CHARS:
        return tuple(tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
    # The batch call releases the interpreter's lock while it works; the single one may not.
    (encoding,) = await asyncio.to_thread(tokenizer.encode_batch, [text], add_special_tokens=add_special_tokens)
    return tuple(encoding.ids)
