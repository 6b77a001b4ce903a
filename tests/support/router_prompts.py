"""What the router makes of texts and conversations, in a process like its own: `python router_prompts.py < CASES`.

CASES: JSON, by model folder: texts to encode and decode, and conversations to render. What is refused is its error.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from tandem.entry import keep_torch_out

keep_torch_out()

from router.http.chat_template import chat_template_of  # noqa: E402
from router.http.fields import Message  # noqa: E402
from router.tokenizer import Tokenizer  # noqa: E402
from tandem.config import ModelConfig  # noqa: E402
from tandem.errors import TandemError  # noqa: E402
from tandem.tokenizer import load_tokenizer  # noqa: E402


def answer(folder: str, texts: list[str], conversations: list[Any]) -> dict[str, Any]:
    try:
        loaded = load_tokenizer(ModelConfig(path=folder))
    except TandemError as error:
        return {"refused": str(error)}
    tokenizer, template = Tokenizer(loaded), chat_template_of(loaded)
    return {
        "ids": [asyncio.run(tokenizer.encode(text, 1 << 20)) for text in texts],
        "chats": [rendered(tokenizer, template, messages) for messages in conversations],
        "special_tokens": tokenizer.special_tokens,
    }


def rendered(tokenizer: Tokenizer, template: Any, messages: list[Any]) -> Any:
    if template is None:
        return "no template"
    try:
        text = template.render([Message.model_validate(message) for message in messages])
    except TandemError as error:
        return {"error": str(error)}
    return {"text": text, "ids": asyncio.run(tokenizer.encode(text, 1 << 20, add_special_tokens=False))}


if __name__ == "__main__":
    found = {folder: answer(folder, *case) for folder, case in json.load(sys.stdin).items()}
    with open("/proc/self/maps") as maps:
        assert "libtorch" not in maps.read(), "torch was loaded"
    json.dump(found, sys.stdout)
