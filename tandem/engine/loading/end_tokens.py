"""The tokens at which an answer ends by itself."""

from __future__ import annotations

from typing import Any

from tandem.config import ModelConfig
from tandem.tokenizer import load_tokenizer


def end_token_ids(settings: ModelConfig, model: Any) -> tuple[int, ...]:
    """Those at which transformers' `generate` stops, then the tokenizer's own end: a chat ends there, whatever the
    model's files say. model: from transformers, which has read all of these. Raises as load_tokenizer does.
    """
    generation = getattr(model, "generation_config", None)
    eos = model.config.get_text_config().eos_token_id if generation is None else generation.eos_token_id
    tokenizer = load_tokenizer(settings)
    ids = [*(eos if isinstance(eos, list) else [eos]), None if tokenizer is None else tokenizer.eos_token_id]
    # A shrunk configuration may keep the end of its elder, which is no token here; banning it would break a step.
    vocab_size = model.config.get_text_config().vocab_size
    return tuple(dict.fromkeys(int(token) for token in ids if token is not None and 0 <= token < vocab_size))
