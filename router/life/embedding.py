"""One Embed call: every input on the prefill worker that placement picks for it."""

from __future__ import annotations

import asyncio

from router.aio import first_error
from router.life.admission import AdmittedEmbed, EmbedPrompt
from router.pool.holds import PrefillHold
from router.pool.registry import Registry
from router.pool.worker import Worker
from tandem.timeline import Phase, Timeline
from tandem.v1 import generation_pb2, worker_pb2
from tandem.wire import embed_params_to_wire

# Inputs of one call that are with workers at a time: one large call must not fill their queues.
MAX_AT_ONCE = 8


class EmbedJob:
    """The inputs of one call, each on its own.

        waiting its turn ──▶ placed ──Embed──▶ embedded
                                └── cancel, deadline, a worker's failure or loss ──▶ the whole call ends and raises

    The workers free everything when their calls end, in whatever way; nothing else is held anywhere.
    """

    def __init__(self, admitted: AdmittedEmbed, deadline: float, timeline: Timeline, registry: Registry) -> None:
        """deadline: on the event loop's clock."""
        self._admitted = admitted
        self._deadline = deadline
        self._registry = registry
        self._turns = asyncio.Semaphore(MAX_AT_ONCE)
        self.timeline = timeline
        # For reports: the worker that was placed on last; nobody decodes.
        self.prefill_worker = self.decode_worker = ""

    @property
    def phase(self) -> Phase:
        return self.timeline.phase

    async def run(self) -> generation_pb2.EmbedResponse:
        """Raises the TandemError that ended it first."""
        with first_error():
            async with asyncio.TaskGroup() as tasks:
                calls = [
                    tasks.create_task(self._embed(index, prompt)) for index, prompt in enumerate(self._admitted.prompts)
                ]
        return self._response([call.result() for call in calls])

    async def _embed(self, index: int, prompt: EmbedPrompt) -> worker_pb2.EmbedPromptResponse:
        async with self._turns:
            key, tokens = f"{self._admitted.request_id}-{index}", len(prompt.prompt_ids)
            view = self._registry.place_prefill(tokens, prompt.block_names)
            self.prefill_worker, worker = view.worker_id, self._registry[view.worker_id]
            hold = PrefillHold(worker, key, view.to_compute(tokens), prompt.block_names, lambda _: hold.cancel())
            with hold:
                remaining_s = max(0.0, self._deadline - asyncio.get_running_loop().time())
                return await hold.embed(self._message(key, prompt, worker), remaining_s)

    def _message(self, key: str, prompt: EmbedPrompt, worker: Worker) -> worker_pb2.EmbedPromptRequest:
        pooling, normalize = embed_params_to_wire(self._admitted.params)
        return worker_pb2.EmbedPromptRequest(
            request_id=key,
            prompt_ids=prompt.prompt_ids,
            cache_salt=self._admitted.cache_salt,
            pooling=pooling,
            normalize=normalize,
            fingerprint=worker.reported.hello.model.fingerprint,
        )

    def _response(self, answers: list[worker_pb2.EmbedPromptResponse]) -> generation_pb2.EmbedResponse:
        return generation_pb2.EmbedResponse(
            embeddings=[generation_pb2.Embedding(values=answer.values) for answer in answers],
            usage=generation_pb2.Usage(
                prompt_tokens=self._admitted.prompt_tokens,
                cached_prompt_tokens=sum(answer.cached_tokens for answer in answers),
            ),
        )
