"""What the router makes of texts and conversations, in a process like its own: `python router_prompts.py < CASES`.

CASES: JSON, by model folder: texts to encode and decode, and conversations to render. What is refused is its error.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from tandem.process.entry import keep_torch_out

keep_torch_out()

from router.doors.http.chat_template import chat_template_of  # noqa: E402
from router.doors.http.fields import Message  # noqa: E402
from router.life.detokenizer import CleanUp, Detokenizer  # noqa: E402
from router.life.output import ChoiceOutput, TokenStep  # noqa: E402
from router.tokenizer import Tokenizer  # noqa: E402
from tandem.config import ModelConfig  # noqa: E402
from tandem.errors import TandemError  # noqa: E402
from tandem.tokenizer import load_tokenizer  # noqa: E402
from tandem.types import FinishReason, Token  # noqa: E402


def answer(folder: str, texts: list[str], conversations: list[Any]) -> dict[str, Any]:
    try:
        loaded = load_tokenizer(ModelConfig(path=folder))
    except TandemError as error:
        return {"refused": str(error)}
    tokenizer, template = Tokenizer(loaded), chat_template_of(loaded)
    ids = [asyncio.run(tokenizer.encode(text, 1 << 20)) for text in texts]
    return {
        "ids": ids,
        "streamed": [[streamed(tokenizer, each, keep) for keep in (False, True)] for each in ids],
        "chats": [rendered(tokenizer, template, messages) for messages in conversations],
        "special_tokens": tokenizer.special_tokens,
    }


def streamed(tokenizer: Tokenizer, ids: tuple[int, ...], keep: bool) -> str:
    """The pieces of an answer that begins with these, and ends with them."""
    clean_up = CleanUp(tokenizer.loaded.clean_up_tokenization) if tokenizer.cleans_up else None
    output = ChoiceOutput(Detokenizer(tokenizer, [], keep), (), 0, clean_up=clean_up)
    steps = [TokenStep((Token(token_id),)) for token_id in ids]
    return "".join(output.push([step])[1] for step in [*steps, TokenStep((), FinishReason.LENGTH)])


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
