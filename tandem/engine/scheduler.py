"""Which tokens the next step processes: decodes first, then prompt chunks up to the token budget.

Decode first with chunked prefill keeps inter-token latency bounded on a colocated worker (Sarathi-Serve, OSDI'24).
A sequence enters only with every block it may ever need, so nothing is ever preempted and nothing deadlocks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

from tandem.config import EngineConfig
from tandem.engine.block_pool import BlockPool
from tandem.engine.sequence import Sequence
from tandem.errors import RETRY_AFTER_MS, Overloaded


@dataclass(frozen=True)
class Chunk:
    """Prompt tokens [start, end) of a sequence."""

    sequence: Sequence
    start: int
    end: int

    @property
    def starts_prompt(self) -> bool:
        """Whether it is the first one of its sequence."""
        assert self.sequence.table is not None
        return self.start == self.sequence.table.cached_tokens

    @property
    def completes_prompt(self) -> bool:
        return self.end == self.sequence.prompt_len

    @property
    def samples(self) -> bool:
        """Whether a token is sampled at its end."""
        return self.completes_prompt and self.sequence.embed is None

    @property
    def pooled(self) -> range:
        """The positions whose final hidden states go into the sequence's embedding."""
        if self.sequence.averages:
            return range(self.start, self.end)
        last = self.sequence.embed is not None and self.completes_prompt
        return range(self.end - 1, self.end) if last else range(0)


@dataclass(frozen=True)
class StepPlan:
    decodes: list[Sequence]
    chunks: list[Chunk]

    def __bool__(self) -> bool:
        return bool(self.decodes or self.chunks)

    @property
    def sequences(self) -> list[Sequence]:
        return [*self.decodes, *(chunk.sequence for chunk in self.chunks)]

    @property
    def num_tokens(self) -> int:
        return len(self.decodes) + sum(chunk.end - chunk.start for chunk in self.chunks)

    def halves(self) -> tuple[StepPlan, StepPlan]:
        """The same work in two steps, about equal in tokens; the second is empty for a plan of one token."""
        left = -(-self.num_tokens // 2)
        decodes, left = self.decodes[:left], left - len(self.decodes[:left])
        first, second = StepPlan(decodes, []), StepPlan(self.decodes[len(decodes) :], [])
        for chunk in self.chunks:
            middle = min(chunk.end, chunk.start + left)
            left -= middle - chunk.start
            for half, start, end in ((first, chunk.start, middle), (second, middle, chunk.end)):
                if start < end:
                    half.chunks.append(replace(chunk, start=start, end=end))
        return first, second

    def without_finished(self) -> StepPlan:
        return StepPlan(
            [sequence for sequence in self.decodes if not sequence.finished],
            [chunk for chunk in self.chunks if not chunk.sequence.finished],
        )

    @property
    def started(self) -> list[Sequence]:
        return [chunk.sequence for chunk in self.chunks if chunk.starts_prompt]

    @property
    def sampled(self) -> list[Sequence]:
        """The sequences that get a token, in the order of the logits' rows."""
        return [*self.decodes, *(chunk.sequence for chunk in self.chunks if chunk.samples)]

    @property
    def pooled(self) -> list[Chunk]:
        """The chunks that bring hidden states for an embedding, in the order of their rows."""
        return [chunk for chunk in self.chunks if chunk.pooled]


class Scheduler:
    """The queues of one engine. Only the engine's thread touches it."""

    def __init__(self, config: EngineConfig, pool: BlockPool) -> None:
        self._config = config
        self._pool = pool
        # As configured, or fewer when the device had no room for so many.
        self.max_step_tokens = config.max_step_tokens
        self.waiting: deque[Sequence] = deque()
        self.prefilling: list[Sequence] = []
        self.running: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.prefilling or self.running)

    @property
    def queued_prompt_tokens(self) -> int:
        return sum(sequence.tokens_left_to_prefill for sequence in (*self.waiting, *self.prefilling))

    def add(self, sequence: Sequence) -> None:
        """Queues a prompt. Raises Overloaded when the queue is full."""
        if len(self.waiting) >= self._config.max_waiting:
            words = f"the prefill queue is full: engine.max_waiting is {self._config.max_waiting}"
            raise Overloaded(words, retry_after_ms=RETRY_AFTER_MS)
        sequence.name_prompt(self._pool.block_size)
        self.waiting.append(sequence)

    def attach(self, sequence: Sequence) -> None:
        """Adds a sequence whose prompt KV is in the pool already, whole and verified."""
        sequence.name_prompt(self._pool.block_size)
        self._computed(sequence, sequence.prompt_len)
        self.running.append(sequence)

    def drop(self, gone: Iterable[Sequence]) -> None:
        """Forgets sequences; their blocks are the caller's to release."""
        ids = {id(sequence) for sequence in gone}
        self.waiting = deque(sequence for sequence in self.waiting if id(sequence) not in ids)
        self.prefilling = [sequence for sequence in self.prefilling if id(sequence) not in ids]
        self.running = [sequence for sequence in self.running if id(sequence) not in ids]

    def schedule(self) -> StepPlan:
        limit = min(self._config.max_running, self.max_step_tokens)
        decodes = self.running[:limit]
        # Those that did not fit come first next time.
        self.running = [*self.running[limit:], *decodes]
        return StepPlan(decodes, self._chunks(self.max_step_tokens - len(decodes), fill=bool(decodes)))

    def _chunks(self, budget: int, fill: bool) -> list[Chunk]:
        """Chunks in order of arrival; prompts are admitted one by one while there is budget.

        Unless the step is to be filled, one that ends a prompt is made longer only by prompts that end in it too: the
        first token of one waits for no part of another, which would not gain by it.
        """
        chunks: list[Chunk] = []
        resumed = iter(list(self.prefilling))
        while budget > 0:
            sequence = next(resumed, None) or self._admit_next()
            if sequence is None:
                break
            chunk = Chunk(sequence, sequence.num_computed, min(sequence.prompt_len, sequence.num_computed + budget))
            if chunks and not (fill or chunk.completes_prompt):
                break
            chunks.append(chunk)
            budget -= chunk.end - chunk.start
        return chunks

    def _admit_next(self) -> Sequence | None:
        sequence = next(filter(self._admit, self._in_line()), None)
        if sequence is not None:
            self.waiting.remove(sequence)
            self.prefilling.append(sequence)
        return sequence

    def _in_line(self) -> Iterator[Sequence]:
        """Who comes next: the first; if it must wait for blocks, the first that brought its own. Those may be the very
        blocks that the other one waits for."""
        yield from islice(self.waiting, 1)
        yield from islice((sequence for sequence in self.waiting if sequence.table is not None), 1)

    def _admit(self, sequence: Sequence) -> bool:
        if sequence.table is None:
            block_size = self._pool.block_size
            names = (sequence.prompt_names or ())[: sequence.reusable_tokens // block_size]
            sequence.table = self._pool.acquire(self._pool.blocks_for(sequence.prompt_len), names)
        if sequence.table is None:
            return False
        sequence.num_computed = sequence.table.cached_tokens
        return True

    def advance(self, plan: StepPlan) -> None:
        """Records that the plan's tokens are computed: publishes full blocks, moves finished prompts on."""
        for sequence in plan.decodes:
            self._computed(sequence, sequence.num_computed + 1)
        for chunk in plan.chunks:
            self._computed(chunk.sequence, chunk.end)
        done = [chunk.sequence for chunk in plan.chunks if chunk.completes_prompt]
        if done:
            self.drop(done)
            self.running += [sequence for sequence in done if sequence.decode_here]

    def _computed(self, sequence: Sequence, num_computed: int) -> None:
        sequence.num_computed = num_computed
        published = len(sequence.hashes)
        sequence.extend_hashes(self._pool.block_size)
        assert sequence.table is not None
        for index in range(published, len(sequence.hashes)):
            self._pool.publish(sequence.table.blocks[index], sequence.hashes[index])
