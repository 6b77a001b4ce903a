"""Which tokens the next step processes: decodes first, then prompt chunks up to the token budget.

Decode first with chunked prefill keeps inter-token latency bounded on a colocated worker (Sarathi-Serve, OSDI'24).
A sequence enters only with every block it may ever need, so nothing is ever preempted and nothing deadlocks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

from tandem.config import EngineConfig
from tandem.engine.block_pool import BlockPool
from tandem.engine.sequence import Sequence, SequenceState
from tandem.errors import RETRY_AFTER_MS, Overloaded


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, end) of a sequence that one step computes: a slice of its prompt, or what it decodes, one token
    as a rule."""

    sequence: Sequence
    start: int
    end: int

    @property
    def decodes(self) -> bool:
        return self.start >= self.sequence.prompt_len

    @property
    def starts_prompt(self) -> bool:
        """Whether it is the first one of its sequence."""
        assert self.sequence.table is not None
        return self.start == self.sequence.table.cached_tokens and not self.decodes

    @property
    def completes_prompt(self) -> bool:
        return self.end == self.sequence.prompt_len

    @property
    def sampled(self) -> range:
        """The positions whose logits a token is sampled from."""
        last = self.decodes or (self.completes_prompt and self.sequence.embed is None)
        return range(self.end - 1, self.end) if last else range(0)

    @property
    def pooled(self) -> range:
        """The positions whose final hidden states go into the sequence's embedding."""
        if self.sequence.averages:
            return range(self.start, self.end)
        last = self.sequence.embed is not None and self.completes_prompt
        return range(self.end - 1, self.end) if last else range(0)


@dataclass(frozen=True)
class StepPlan:
    # Decodes first; one chunk a sequence.
    chunks: list[Chunk]
    # So many layers' KV of it is in the pool already, and may be on its way to others, by a step that had no room for
    # the rest.
    written: int = 0

    @property
    def decodes(self) -> list[Chunk]:
        return [chunk for chunk in self.chunks if chunk.decodes]

    @property
    def prefills(self) -> list[Chunk]:
        return [chunk for chunk in self.chunks if not chunk.decodes]

    @property
    def sequences(self) -> list[Sequence]:
        return [chunk.sequence for chunk in self.chunks]

    @property
    def num_tokens(self) -> int:
        return sum(chunk.end - chunk.start for chunk in self.chunks)

    def halves(self, written: int = 0) -> list[StepPlan]:
        """The same work in two steps, about equal in tokens; the second is empty for a plan of one token."""
        left = -(-self.num_tokens // 2)
        halves: tuple[list[Chunk], list[Chunk]] = [], []
        for chunk in self.chunks:
            middle = min(chunk.end, chunk.start + left)
            left -= middle - chunk.start
            for half, start, end in ((halves[0], chunk.start, middle), (halves[1], middle, chunk.end)):
                if start < end:
                    half.append(replace(chunk, start=start, end=end))
        return [StepPlan(half, written) for half in halves]

    def without_ended(self) -> StepPlan:
        return replace(self, chunks=[c for c in self.chunks if c.sequence.state is not SequenceState.ENDED])

    @property
    def started(self) -> list[Sequence]:
        return [chunk.sequence for chunk in self.chunks if chunk.starts_prompt]

    @property
    def sampled(self) -> list[Sequence]:
        """The sequences that get a token, in the order of the logits' rows."""
        return [chunk.sequence for chunk in self.chunks if chunk.sampled]

    @property
    def pooled(self) -> list[Chunk]:
        """The chunks that bring hidden states for an embedding, in the order of their rows."""
        return [chunk for chunk in self.chunks if chunk.pooled]


# Sequences in order.
_Queue = OrderedDict[Sequence, None]


class Scheduler:
    """The queues of one engine, each of the sequences in one state. Only the engine's thread touches it."""

    def __init__(self, config: EngineConfig, pool: BlockPool) -> None:
        self._config = config
        self.pool = pool
        # As configured, or fewer when the device had no room for so many.
        self.max_step_tokens = config.max_step_tokens
        self.waiting, self.prefilling, self.running = _Queue(), _Queue(), _Queue()
        self._queues = {
            SequenceState.WAITING: self.waiting,
            SequenceState.PREFILLING: self.prefilling,
            SequenceState.RUNNING: self.running,
        }

    @property
    def num_live(self) -> int:
        """Sequences that wait or are worked on."""
        return sum(map(len, self._queues.values()))

    @property
    def queued_prompt_tokens(self) -> int:
        return sum(sequence.tokens_left_to_prefill for sequence in (*self.waiting, *self.prefilling))

    def add(self, sequence: Sequence) -> None:
        """Queues a prompt. Raises Overloaded when the queue is full."""
        if len(self.waiting) >= self._config.max_waiting:
            words = f"the prefill queue is full: engine.max_waiting is {self._config.max_waiting}"
            raise Overloaded(words, retry_after_ms=RETRY_AFTER_MS)
        sequence.name_prompt(self.pool.block_size)
        self._move(sequence, SequenceState.WAITING)

    def attach(self, sequence: Sequence) -> None:
        """Adds a sequence whose prompt KV is in the pool already, whole and verified."""
        sequence.name_prompt(self.pool.block_size)
        self._computed(sequence, sequence.prompt_len)
        self._move(sequence, SequenceState.RUNNING)

    def end(self, sequence: Sequence) -> None:
        """Forgets a sequence; its blocks are the caller's to release."""
        self._move(sequence, SequenceState.ENDED)

    def schedule(self) -> StepPlan:
        limit = min(self._config.max_running, self.max_step_tokens)
        decodes = [Chunk(s, s.num_computed, s.num_computed + 1) for s in islice(self.running, limit)]
        if limit < len(self.running):  # those that did not fit come first next time
            for chunk in decodes:
                self.running.move_to_end(chunk.sequence)
        return StepPlan(decodes + self._prefills(self.max_step_tokens - len(decodes), fill=bool(decodes)))

    def _prefills(self, budget: int, fill: bool) -> list[Chunk]:
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
        sequence = next(filter(self._has_blocks, self._in_line()), None)
        if sequence is not None:
            assert sequence.table is not None
            sequence.num_computed = sequence.table.cached_tokens
            self._move(sequence, SequenceState.PREFILLING)
        return sequence

    def _in_line(self) -> Iterator[Sequence]:
        """Who comes next: the first; if it must wait for blocks, the first that brought its own. Those may be the very
        blocks that the other one waits for."""
        yield from islice(self.waiting, 1)
        yield from islice((sequence for sequence in self.waiting if sequence.table is not None), 1)

    def _has_blocks(self, sequence: Sequence) -> bool:
        """Brought, or taken from the pool now."""
        if sequence.table is None:
            names = (sequence.prompt_names or ())[: sequence.reusable_tokens // self.pool.block_size]
            sequence.table = self.pool.acquire(self.pool.blocks_for(sequence.prompt_len), names)
        return sequence.table is not None

    def advance(self, plan: StepPlan) -> None:
        """Records that the plan's tokens are computed: publishes full blocks, moves finished prompts on."""
        for chunk in plan.chunks:
            self._computed(chunk.sequence, chunk.end)
            if chunk.completes_prompt:
                here = chunk.sequence.decode_here
                self._move(chunk.sequence, SequenceState.RUNNING if here else SequenceState.ENDED)

    def _computed(self, sequence: Sequence, num_computed: int) -> None:
        sequence.num_computed = num_computed
        published = len(sequence.hashes)
        sequence.extend_hashes(self.pool.block_size)
        assert sequence.table is not None
        for index in range(published, len(sequence.hashes)):
            self.pool.publish(sequence.table.blocks[index], sequence.hashes[index])

    def _move(self, sequence: Sequence, state: SequenceState) -> None:
        if sequence.state in self._queues:
            del self._queues[sequence.state][sequence]
        sequence.state = state
        if state in self._queues:
            self._queues[state][sequence] = None
