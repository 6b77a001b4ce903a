"""The engine of a worker: schedule → run → sample → emit."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tandem.config import TandemConfig
from tandem.engine.backends.backend import Allocate, DeviceLost, backend_for, first_line, is_lost
from tandem.engine.block_pool import BlockPool, BlockTable
from tandem.engine.kv_cache import KVCache
from tandem.engine.kv_progress import KVProgress
from tandem.engine.loading.kv_sizing import size_pool
from tandem.engine.loading.model_loader import load_model
from tandem.engine.loading.self_check import require_exactness
from tandem.engine.model_runner import ModelRunner, StepOutput
from tandem.engine.pooler import Pooler
from tandem.engine.sampler import Sampler, stop_ids
from tandem.engine.scheduler import Scheduler, StepPlan
from tandem.engine.sequence import (
    Embedded,
    Emission,
    Failed,
    Names,
    NewToken,
    Sequence,
    SequenceState,
    Started,
    prompt_hashes,
)
from tandem.engine.step_room import StepRoom
from tandem.errors import RETRY_AFTER_MS, InternalError, InvalidRequest, OutOfMemory, TandemError
from tandem.out_of_memory import is_out_of_memory
from tandem.types import EngineRequest, FinishReason, Token

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineLoad:
    """A snapshot made after each step and each change of the queues, for heartbeats."""

    queued_prompt_tokens: int = 0
    running: int = 0
    waiting: int = 0
    steps: int = 0
    prefix_hit_tokens: int = 0
    prefix_query_tokens: int = 0
    # Steps that the device had no room for.
    out_of_memory: int = 0


class Engine:
    """One model, one KV pool, one loop. One thread calls its methods; `pool`, `reserve` and `load` are for any thread.

    Ownership of blocks: a sequence that decodes here gives its table back when it ends. A sequence that only
    prefills leaves its table to whoever added it, who releases it when the handoff is over.
    """

    def __init__(
        self, config: TandemConfig, publish: Callable[[list[Emission]], None], allocate: Allocate | None = None
    ) -> None:
        """Loads the model; `publish` gets what each step brought, in order. allocate: see KVCache.

        Raises ModelRefused when the model would not be served exactly.
        """
        self.backend = backend_for(config.engine.device)
        self.backend.require_device()
        loaded = load_model(config)
        self.info, self.fingerprint = loaded.info, loaded.info.fingerprint
        weights_bytes = sum(parameter.nbytes for parameter in loaded.model.parameters())
        self.backend.prepare_model(loaded.model)
        self._runner = ModelRunner(loaded, KVCache(self.fingerprint, 0, self.backend))
        self._sampler = Sampler(self.info.eos_token_ids, self.backend)
        num_blocks = size_pool(config.engine, loaded, self._runner, self._sampler)
        self.cache = self._runner.cache = KVCache(self.fingerprint, num_blocks, self.backend, allocate)
        self.pool = BlockPool(num_blocks, self.fingerprint.block_size, config.engine.prefix_cache)
        self.load = EngineLoad()
        self._steps = self._hit_tokens = self._query_tokens = 0
        self._publish = publish
        self._tell_bytes = config.worker.frame_bytes
        self._pooler = Pooler()
        self._scheduler = Scheduler(config.engine, self.pool)
        self._room = StepRoom(self._scheduler, self.backend)
        require_exactness(loaded, self._runner, self.pool)
        self.backend.settle(weights_bytes)

    @property
    def has_work(self) -> bool:
        return self.num_live > 0

    @property
    def num_live(self) -> int:
        return self._scheduler.num_live

    def name_blocks(self, request: EngineRequest) -> list[bytes]:
        """The names of the prompt's full blocks, for `reserve` and Sequence. For any thread.

        A long prompt takes milliseconds: not for the event loop, and not twice.
        """
        return prompt_hashes(request, self.pool.block_size)

    def reserve(self, request: EngineRequest, prefill_here: bool, names: Names | None = None) -> BlockTable | None:
        """Blocks for prompt and output, or None while the pool is too full. For any thread.

        With prefill_here the last prompt token is left to compute, because its logits are needed. Raises
        InvalidRequest when the pool could never hold the request.
        """
        names = self.name_blocks(request) if names is None else names
        prompt_len = len(request.prompt_ids)
        # The last token generated is never read again, so its KV is never written.
        num_blocks = self.pool.blocks_for(prompt_len + request.sampling.max_tokens - 1)
        self.require_fit(num_blocks)
        reusable = prompt_len - 1 if prefill_here else prompt_len
        return self.pool.acquire(num_blocks, names[: reusable // self.pool.block_size])

    def validate(self, request: EngineRequest) -> None:
        """Raises InvalidRequest for what would break a step, and with it other requests. For any thread.

        For one that is to be embedded validate_prompt is enough: nothing is sampled.
        """
        params = request.sampling
        self.validate_prompt(request, (*params.logit_bias, *params.stop_token_ids))
        if len(request.prompt_ids) + params.max_tokens > self.info.max_model_len:
            raise InvalidRequest(
                f"prompt ({len(request.prompt_ids)}) + max_tokens ({params.max_tokens}) is over the model's "
                f"{self.info.max_model_len} tokens",
                field="max_tokens",
            )

    def validate_prompt(self, request: EngineRequest, other_ids: tuple[int, ...] = ()) -> None:
        """Raises InvalidRequest. other_ids: token ids that must be of the vocabulary too."""
        prompt = request.prompt_ids
        if not prompt:
            raise InvalidRequest("the prompt is empty", field="prompt")
        highest = max((*prompt, *other_ids))
        if highest >= self.info.vocab_size:
            raise InvalidRequest(
                f"token id {highest} is not below the vocabulary's {self.info.vocab_size}", field="prompt"
            )
        if len(prompt) > self.info.max_model_len:
            raise InvalidRequest(
                f"the prompt has {len(prompt)} tokens; the model's limit is {self.info.max_model_len}", field="prompt"
            )

    def require_fit(self, num_blocks: int) -> None:
        """Raises InvalidRequest when the whole pool has fewer blocks."""
        if num_blocks > self.pool.num_blocks:
            size = self.pool.block_size
            raise InvalidRequest(
                f"the request needs KV for {num_blocks * size} tokens; the pool holds {self.pool.num_blocks * size}",
                field="prompt",
            )

    def add(self, sequence: Sequence) -> None:
        """Queues a prompt. Raises Overloaded or InvalidRequest; nothing is held then."""
        if sequence.table is None:
            self.require_fit(self.pool.blocks_for(sequence.prompt_len))
        self._scheduler.add(sequence)
        self._take_snapshot()

    def attach(self, sequence: Sequence) -> None:
        """Continues a sequence whose prompt KV arrived, sealed and verified, and whose first token is known."""
        self._scheduler.attach(sequence)
        self._take_snapshot()

    def abort(self, sequence: Sequence) -> None:
        """Stops work on a sequence, whatever its state; frees its blocks if the engine owns them. Idempotent."""
        if sequence.state is not SequenceState.ENDED:
            self._retire([sequence])
            self._take_snapshot()

    def require_device(self) -> None:
        """Raises DeviceLost when nothing can be computed any more, whoever met the error first."""
        if why := self.backend.why_lost():
            raise DeviceLost(f"the device is lost: {why}")

    def step(self) -> bool:
        """Processes one batch of tokens. A failure ends the step's sequences, not the engine.

        False when there was nothing to process: whoever waits needs blocks that others hold.
        """
        plan = self._scheduler.schedule()
        if not plan.chunks:
            return False
        self._announce(plan)
        parts = [plan]  # one, as long as the device has room for it
        while parts:
            part = parts.pop(0).without_ended()
            if not part.chunks:
                continue
            progress = KVProgress(part, self.fingerprint, self._tell_bytes, self._publish)
            try:
                output = self._runner.run(part, progress.layer_written)
                tokens, embedded = self._sample(part, output)
            except Exception as error:
                parts[:0] = self._recover(part, progress.told, error)
            else:
                self._emit(part, progress, tokens, embedded)
        self._room.step_done()
        self._steps += 1
        self._take_snapshot()
        return True

    def _announce(self, plan: StepPlan) -> None:
        now = time.monotonic()
        if started := plan.started:
            self._publish([(s, Started((now - s.arrived_s) * 1000, s.num_computed, now)) for s in started])
            self._hit_tokens += sum(sequence.num_computed for sequence in started)
            self._query_tokens += sum(sequence.prompt_len for sequence in started if not sequence.averages)

    def _sample(self, plan: StepPlan, output: StepOutput) -> tuple[list[Token], list[tuple[Sequence, Embedded]]]:
        with torch.inference_mode():
            tokens = self._sampler.sample(output.logits_RxV, plan.sampled) if plan.sampled else []
            embedded = self._pooler.pool(output.hidden_ExD, plan.pooled) if plan.pooled else []
        return tokens, embedded

    def _emit(
        self, plan: StepPlan, progress: KVProgress, tokens: list[Token], embedded: list[tuple[Sequence, Embedded]]
    ) -> None:
        self._scheduler.advance(plan)
        emissions: list[Emission] = [*progress.rest()]
        for sequence, token in zip(plan.sampled, tokens, strict=True):
            sequence.output_ids.append(token.id)
            sequence.finish_reason = finish_reason(sequence, self.info.eos_token_ids)
            emissions.append((sequence, NewToken(len(sequence.output_ids) - 1, token, sequence.finish_reason)))
        self._retire([sequence for sequence in plan.sampled if sequence.finish_reason is not None])
        self._publish([*emissions, *embedded])

    def _recover(self, plan: StepPlan, told: int, error: Exception) -> list[StepPlan]:
        """What is done instead of a plan that failed: without room, its halves. Raises DeviceLost."""
        if is_out_of_memory(error):
            halves = self._room.halve(plan, told)
            if not halves:
                words = "the worker's device has no memory left for this request"
                self._fail(plan, OutOfMemory(words, retry_after_ms=RETRY_AFTER_MS))
            return halves
        ids = ",".join(sequence.request.request_id for sequence in plan.sequences)
        log.exception("a step of %d sequences failed", len(plan.sequences), extra={"request_id": ids})
        if is_lost(error, self.backend):
            raise DeviceLost(f"the device is lost: {first_line(error)}") from error
        self._fail(plan, InternalError("the engine failed on this step; the worker's log has the details"))
        return []

    def _fail(self, plan: StepPlan, failure: TandemError) -> None:
        for sequence in plan.sequences:
            sequence.finish_reason = FinishReason.ERROR
        self._retire(plan.sequences)
        self._publish([(sequence, Failed(failure)) for sequence in plan.sequences])

    def _retire(self, gone: list[Sequence]) -> None:
        for sequence in gone:
            self._scheduler.end(sequence)
            if sequence.decode_here and sequence.table is not None:
                sequence.table.release()

    def _take_snapshot(self) -> None:
        scheduler = self._scheduler
        self.load = EngineLoad(
            queued_prompt_tokens=scheduler.queued_prompt_tokens,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            steps=self._steps,
            prefix_hit_tokens=self._hit_tokens,
            prefix_query_tokens=self._query_tokens,
            out_of_memory=self._room.out_of_memory,
        )


def finish_reason(sequence: Sequence, eos_token_ids: tuple[int, ...]) -> FinishReason | None:
    """Whether the newest token ends the sequence (min_tokens is kept by the sampler, which bans stop tokens)."""
    params = sequence.request.sampling
    if sequence.output_ids[-1] in stop_ids(params, eos_token_ids):
        return FinishReason.STOP
    return FinishReason.LENGTH if len(sequence.output_ids) >= params.max_tokens else None
