"""The engine of a worker: schedule → run → sample → emit."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from tandem.config import EngineConfig, TandemConfig
from tandem.engine.backends.cpu.memory import use_huge_pages
from tandem.engine.backends.cuda.device import DeviceLost, first_line, is_lost, require_device, why_lost
from tandem.engine.block_pool import BlockPool, BlockTable
from tandem.engine.kv_cache import Allocate, KVCache, count_blocks
from tandem.engine.kv_progress import KVProgress
from tandem.engine.loading.model_loader import LoadedModel, load_model
from tandem.engine.loading.self_check import require_exactness, tokens_checked
from tandem.engine.model_runner import ModelRunner
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
    Started,
    prompt_hashes,
)
from tandem.engine.step_room import StepRoom
from tandem.errors import RETRY_AFTER_MS, InternalError, InvalidRequest, OutOfMemory, TandemError
from tandem.out_of_memory import is_out_of_memory
from tandem.types import EngineRequest, FinishReason, Token

log = logging.getLogger(__name__)

# Below this the weights fit into a cache or two, and moving memory takes longer than it saves.
_HUGE_PAGES_FROM_BYTES = 128 << 20


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
        self._device = config.engine.device
        require_device(config.engine)
        loaded = load_model(config)
        self.info = loaded.info
        self.fingerprint = loaded.info.fingerprint
        weights_bytes = sum(parameter.nbytes for parameter in loaded.model.parameters())
        if config.engine.device == "cpu":
            _fuse(loaded.model)
        self._runner = ModelRunner(loaded, KVCache(self.fingerprint, 0, self._device), self._device)
        self._sampler = Sampler(self.info.eos_token_ids)
        num_blocks = self._count_blocks(config.engine, loaded)
        self.cache = self._runner.cache = KVCache(self.fingerprint, num_blocks, self._device, allocate)
        self.pool = BlockPool(num_blocks, self.fingerprint.block_size, config.engine.prefix_cache)
        self.load = EngineLoad()
        self._steps = self._hit_tokens = self._query_tokens = 0
        self._publish = publish
        self._tell_bytes = config.worker.frame_bytes
        self._pooler = Pooler()
        self._scheduler = Scheduler(config.engine, self.pool)
        self._room = StepRoom(self._scheduler, self._device, self._attempt, self._give_up)
        self._live: dict[Sequence, None] = {}
        require_exactness(loaded, self._runner, self.pool)
        self._warn_of_a_small_pool()
        if config.engine.device == "cpu" and weights_bytes >= _HUGE_PAGES_FROM_BYTES:
            use_huge_pages()

    def _count_blocks(self, config: EngineConfig, loaded: LoadedModel) -> int:
        least = tokens_checked(self.info)
        if config.device == "cpu":
            return count_blocks(config, self.fingerprint, least)
        # Imported late: one device's kernels must not be needed, or compiled, on the other.
        from tandem.engine.loading.kv_sizing import attention_obstacles, blocks_left

        if obstacles := attention_obstacles(loaded):
            log.warning(
                "attention copies keys and values together in every step, which is slow: %s", "; ".join(obstacles)
            )
        return count_blocks(
            config, self.fingerprint, least, lambda: blocks_left(config, loaded, self._runner, self._sampler)
        )

    def _warn_of_a_small_pool(self) -> None:
        size = self.pool.block_size
        if (held := self.pool.num_blocks * size) < self.info.max_model_len:
            log.warning(
                "the KV pool holds %d tokens: longer requests are refused, though the model takes %d; "
                "for those engine.num_blocks must be %d or more",
                held,
                self.info.max_model_len,
                self.pool.blocks_for(self.info.max_model_len),
            )

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    @property
    def num_live(self) -> int:
        return len(self._live)

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

        Of one that is to be embedded, validate_prompt is enough: nothing is sampled.
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
        self._live[sequence] = None
        self._take_snapshot()

    def attach(self, sequence: Sequence) -> None:
        """Continues a sequence whose prompt KV arrived, sealed and verified, and whose first token is known."""
        self._scheduler.attach(sequence)
        self._live[sequence] = None
        self._take_snapshot()

    def abort(self, sequence: Sequence) -> None:
        """Stops work on a sequence, whatever its state; frees its blocks if the engine owns them. Idempotent."""
        if not sequence.finished:
            sequence.aborted = True
            self._retire([sequence])
            self._take_snapshot()

    def require_device(self) -> None:
        """Raises DeviceLost when nothing can be computed any more, whoever met the error first."""
        if why := why_lost(self._device):
            raise DeviceLost(f"the device is lost: {why}")

    def step(self) -> bool:
        """Processes one batch of tokens. A failure ends the step's sequences, not the engine.

        False when there was nothing to process: whoever waits needs blocks that others hold.
        """
        plan = self._scheduler.schedule()
        if not plan:
            return False
        self._announce(plan)
        self._room.process(plan)
        self._steps += 1
        self._take_snapshot()
        return True

    def _attempt(self, plan: StepPlan, told: int) -> int | None:
        """See StepRoom."""
        progress = KVProgress(plan.chunks, self.fingerprint, self._tell_bytes, self._publish, told)
        try:
            tokens, embedded = self._run(plan, progress)
        except Exception as error:
            if is_out_of_memory(error):
                return progress.told
            self._end(plan, error)
        else:
            self._emit(plan, progress, tokens, embedded)
        return None

    def _end(self, plan: StepPlan, error: Exception) -> None:
        ids = ",".join(sequence.request.request_id for sequence in plan.sequences)
        log.exception("a step of %d sequences failed", len(plan.sequences), extra={"request_id": ids})
        if is_lost(error, self._device):
            raise DeviceLost(f"the device is lost: {first_line(error)}") from error
        self._fail(plan, InternalError("the engine failed on this step; the worker's log has the details"))

    def _give_up(self, plan: StepPlan) -> None:
        words = "the worker's device has no memory left for this request"
        self._fail(plan, OutOfMemory(words, retry_after_ms=RETRY_AFTER_MS))

    def _announce(self, plan: StepPlan) -> None:
        now = time.monotonic()
        if started := plan.started:
            self._publish([(s, Started((now - s.arrived_s) * 1000, s.num_computed, now)) for s in started])
            self._hit_tokens += sum(sequence.num_computed for sequence in started)
            self._query_tokens += sum(sequence.prompt_len for sequence in started if not sequence.averages)

    def _run(self, plan: StepPlan, progress: KVProgress) -> tuple[list[Token], list[tuple[Sequence, Embedded]]]:
        output = self._runner.run(plan, progress.layer_written, progress.told)
        with torch.inference_mode():
            tokens = self._sampler.sample(output.logits_RxV, plan.sampled) if plan.sampled else []
            embedded = self._pooler.pool(output.hidden_ExD, plan.pooled) if plan.pooled else []
        return tokens, embedded

    def _emit(
        self, plan: StepPlan, progress: KVProgress, tokens: list[Token], embedded: list[tuple[Sequence, Embedded]]
    ) -> None:
        self._scheduler.advance(plan)
        emissions: list[Emission] = [*progress.rest()]
        emissions += [(s, self._append(s, token)) for s, token in zip(plan.sampled, tokens, strict=True)]
        emissions += embedded
        self._retire([s for s in plan.sampled if s.finished or not s.decode_here])
        self._retire([sequence for sequence, _ in embedded])
        self._publish(emissions)

    def _append(self, sequence: Sequence, token: Token) -> NewToken:
        sequence.output_ids.append(token.id)
        sequence.finish_reason = finish_reason(sequence, self.info.eos_token_ids)
        return NewToken(len(sequence.output_ids) - 1, token, sequence.finish_reason)

    def _retire(self, gone: list[Sequence]) -> None:
        self._scheduler.drop(gone)
        for sequence in gone:
            self._live.pop(sequence, None)
            if sequence.decode_here and sequence.table is not None:
                sequence.table.release()

    def _fail(self, plan: StepPlan, failure: TandemError) -> None:
        for sequence in plan.sequences:
            sequence.finish_reason = FinishReason.ERROR
        self._retire(plan.sequences)
        self._publish([(sequence, Failed(failure)) for sequence in plan.sequences])

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


def _fuse(model: nn.Module) -> None:
    # Imported late: a GPU worker never compiles the CPU's kernels.
    from tandem.engine.backends.cpu.fusion import fuse_for_cpu

    fuse_for_cpu(model)


def finish_reason(sequence: Sequence, eos_token_ids: tuple[int, ...]) -> FinishReason | None:
    """Whether the newest token ends the sequence (min_tokens is kept by the sampler, which bans stop tokens)."""
    params = sequence.request.sampling
    if sequence.output_ids[-1] in stop_ids(params, eos_token_ids):
        return FinishReason.STOP
    return FinishReason.LENGTH if len(sequence.output_ids) >= params.max_tokens else None
