"""What `embed` returns."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from tandem.types import Usage
from tandem.v1 import generation_pb2


@dataclass(frozen=True)
class Embeddings:
    # One for each input, in order; all of the width of the model's hidden states.
    vectors: tuple[tuple[float, ...], ...]
    # Sum over all inputs; output_tokens is 0.
    usage: Usage


def embeddings_from_wire(message: generation_pb2.EmbedResponse) -> Embeddings:
    usage = message.usage
    return Embeddings(
        tuple(struct.unpack(f"<{len(each.values) // 4}f", each.values) for each in message.embeddings),
        Usage(usage.prompt_tokens, usage.output_tokens, usage.cached_prompt_tokens),
    )
