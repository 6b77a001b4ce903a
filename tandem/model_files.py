"""The small files of a model's directory, read before libraries do: their errors seldom say which file is broken.

`generation_config.json` they even leave aside then, and with it the tokens at which answers end.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from tandem.config import ModelConfig
from tandem.errors import ModelRefused

# JSON objects, where they are there at all.
_OBJECTS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
CHAT_TEMPLATE = "chat_template.jinja"


def require_readable(model: ModelConfig, source: str) -> None:
    """source: where the model is; of a hub id nothing is read. Raises ModelRefused, naming the file and its fault."""
    for name in (*_OBJECTS, CHAT_TEMPLATE):
        path = Path(source, name)
        if os.path.lexists(path) and (fault := fault_of(path)):
            raise ModelRefused(f"{model.served_name} is refused: its {name} {fault}", field="model.path")


def fault_of(path: Path) -> str:
    """What is wrong with a file that is to be a JSON object, or a template's text; empty: nothing."""
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except UnicodeDecodeError as error:
        return f"is not UTF-8 text: {error}"
    if path.name == CHAT_TEMPLATE:
        return ""
    if not text.strip():
        return "is empty"
    try:
        return "" if isinstance(json.loads(text), dict) else "is not a JSON object"
    except (ValueError, RecursionError) as error:
        return f"is not JSON: {error}"
