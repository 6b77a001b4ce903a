"""Embeddings: a prompt is computed as for a prefill, and its final hidden states are pooled instead of handed off."""

from __future__ import annotations

import asyncio
from typing import Any

from prefill_worker.call import in_engine
from tandem import wire
from tandem.engine.sequence import Embedded, EngineEvent, Failed, Sequence, Started
from tandem.v1 import worker_pb2
from tandem.worker.host import WorkerHost


async def embed(
    host: WorkerHost, message: worker_pb2.EmbedPromptRequest, context: Any
) -> worker_pb2.EmbedPromptResponse:
    """One Embed call. Ending it in any way, also by cancel or deadline, frees the prompt's blocks."""
    host.require_fingerprint(message.fingerprint, "model")
    request = await host.read_prompt(message)
    events: asyncio.Queue[EngineEvent] = asyncio.Queue()
    params = wire.embed_params_from_wire(message.pooling, message.normalize)
    names = await host.name_blocks(request)
    sequence = Sequence(request, events.put_nowait, decode_here=False, embed=params, prompt_names=names)
    cached_tokens = 0
    async with in_engine(host, sequence, context):
        while True:
            match await events.get():
                case Started() as started:
                    cached_tokens = started.cached_tokens
                case Embedded() as embedded:
                    return worker_pb2.EmbedPromptResponse(values=embedded.vector, cached_tokens=cached_tokens)
                case Failed() as failed:
                    raise failed.error
