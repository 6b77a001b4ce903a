"""Embeddings: a prompt is computed as for a prefill, and its final hidden states are pooled instead of handed off."""

from __future__ import annotations

import asyncio
from typing import Any

from prefill_worker.call import leave_engine
from tandem import rpc, wire
from tandem.engine.sequence import Embedded, EngineEvent, Failed, Sequence, Started
from tandem.errors import Refused
from tandem.process import logs
from tandem.v1 import worker_pb2
from tandem.worker.host import WorkerHost


async def embed(
    host: WorkerHost, message: worker_pb2.EmbedPromptRequest, context: Any
) -> worker_pb2.EmbedPromptResponse:
    """One Embed call. Ending it in any way, also by cancel or deadline, frees the prompt's blocks."""
    logs.about(message.request_id)
    fingerprint = wire.fingerprint_from_wire(message.fingerprint)
    difference = host.engine.fingerprint.difference(fingerprint)
    if difference is not None:
        raise Refused(f"the request is for another model: {difference}")
    request = await host.read_prompt(message)
    events: asyncio.Queue[EngineEvent] = asyncio.Queue()
    params = wire.embed_params_from_wire(message.pooling, message.normalize)
    names = await host.name_blocks(request)
    sequence = Sequence(request, events.put_nowait, decode_here=False, embed=params, prompt_names=names)
    try:
        await host.thread.call(lambda: host.engine.add(sequence))
        await rpc.say_counted_from(context, host.next_heartbeat)
        return await _until_embedded(events)
    finally:
        # Between steps: the engine may be writing into the blocks this very moment.
        host.thread.post(lambda: leave_engine(host.engine, sequence))


async def _until_embedded(events: asyncio.Queue[EngineEvent]) -> worker_pb2.EmbedPromptResponse:
    cached_tokens = 0
    while True:
        match await events.get():
            case Started() as started:
                cached_tokens = started.cached_tokens
            case Embedded() as embedded:
                return worker_pb2.EmbedPromptResponse(values=embedded.vector, cached_tokens=cached_tokens)
            case Failed() as failed:
                raise failed.error
