"""One Embed call: every input on the prefill worker that placement picks for it."""

from __future__ import annotations

import asyncio

from router.aio import first_error
from router.life.admission import AdmittedEmbed, EmbedPrompt
from router.placement import choose_prefill
from router.pool.registry import Registry
from router.pool.worker import Worker
from tandem import rpc
from tandem.errors import TandemError
from tandem.timeline import Phase, Timeline
from tandem.types import Role
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
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.timeline = timeline
        # For reports: the worker that was placed on last; nobody decodes.
        self.prefill_worker = self.decode_worker = ""

    @property
    def phase(self) -> Phase:
        return self.timeline.phase

    def fail(self, error: TandemError) -> None:
        """Ends the call from outside."""
        if not self._failure.done():
            self._failure.set_exception(error)

    async def run(self) -> generation_pb2.EmbedResponse:
        """Raises the TandemError that ended it first."""
        with first_error():
            async with asyncio.TaskGroup() as tasks:
                watch = tasks.create_task(self._watch())
                calls = [
                    tasks.create_task(self._embed(index, prompt)) for index, prompt in enumerate(self._admitted.prompts)
                ]
                await asyncio.wait(calls)
                watch.cancel()
        return self._response([call.result() for call in calls])

    async def _watch(self) -> None:
        await self._failure

    async def _embed(self, index: int, prompt: EmbedPrompt) -> worker_pb2.EmbedPromptResponse:
        async with self._turns:
            key, tokens = f"{self._admitted.request_id}-{index}", len(prompt.prompt_ids)
            view = choose_prefill(self._registry.snapshot(prompt.block_names), tokens, self._registry.absent())
            self.prefill_worker, worker = view.worker_id, self._registry[view.worker_id]
            call = worker.embed(self._message(key, prompt, worker), self._remaining_s())
            worker.queued.place(key, view.to_compute(tokens))
            worker.prefill_pace.sent(key, view.to_compute(tokens))
            try:
                # A cancelled call of a lost worker raises that loss: `calling` sees to it.
                worker.attach(key, Role.PREFILL, lambda _loss: call.cancel())
                with worker.calling(Role.PREFILL):
                    worker.queued.taken(key, await rpc.counted_from(call))
                    answer: worker_pb2.EmbedPromptResponse = await call
                worker.prefixes.expect(prompt.block_names)
                worker.prefill_pace.computed(key)
                return answer
            finally:
                call.cancel()
                worker.queued.drop(key)
                worker.prefill_pace.dropped(key)
                worker.detach(key, Role.PREFILL)

    def _message(self, key: str, prompt: EmbedPrompt, worker: Worker) -> worker_pb2.EmbedPromptRequest:
        pooling, normalize = embed_params_to_wire(self._admitted.params)
        return worker_pb2.EmbedPromptRequest(
            request_id=key,
            prompt_ids=prompt.prompt_ids,
            cache_salt=self._admitted.cache_salt,
            pooling=pooling,
            normalize=normalize,
            fingerprint=worker.hello.model.fingerprint,
        )

    def _remaining_s(self) -> float:
        return max(0.0, self._deadline - asyncio.get_running_loop().time())

    def _response(self, answers: list[worker_pb2.EmbedPromptResponse]) -> generation_pb2.EmbedResponse:
        return generation_pb2.EmbedResponse(
            embeddings=[generation_pb2.Embedding(values=answer.values) for answer in answers],
            usage=generation_pb2.Usage(
                prompt_tokens=self._admitted.prompt_tokens,
                cached_prompt_tokens=sum(answer.cached_tokens for answer in answers),
            ),
        )
