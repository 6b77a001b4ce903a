"""Before a model is served: do paged chunks and decode steps of several sequences give the model's own logits?

Catches whatever the probe cannot see: state that passes between tokens outside of attention, positions taken from the
rows of a step, a sequence's result that depends on its neighbours. What begins to matter at a length that the
configuration names is looked at with that length made short, and by positions far from the start.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from tandem.engine.block_pool import BlockPool
from tandem.engine.loading.examination import as_transformers, examine, require_keys_and_values
from tandem.engine.loading.failures import refusing
from tandem.engine.loading.model_loader import LoadedModel
from tandem.engine.loading.thresholds import SHORT, named_lengths, shortened
from tandem.engine.model_runner import ModelRunner
from tandem.engine.scheduler import Chunk, StepPlan
from tandem.engine.sequence import Sequence
from tandem.errors import ModelRefused
from tandem.types import EngineRequest, ModelInfo, SamplingParams

log = logging.getLogger(__name__)

# Relative L2 error of a row of logits: reassociation in float32 gives 1e-6, rounding in half precision 1e-2; another
# computation gives about 1.
_TOLERANCE = {"float32": 1e-3, "float16": 0.2, "bfloat16": 0.2}
# The same computation, twice.
_SAME = 1e-5
# Logits so far below the best one have no probability in any arithmetic.
_OUT_OF_REACH = 1000.0
# Spread of logits below which rounding is no relative error: they are all alike.
_LEAST_SPREAD = 1e-6
# Tokens of the longest sequence, with the one that it decodes.
_TOKENS = 16


def tokens_checked(info: ModelInfo) -> int:
    """Tokens whose KV the pool must hold: two sequences at once, in blocks of their own."""
    size = info.fingerprint.block_size
    return 2 * -(-_length(info) // size) * size


def require_exactness(loaded: LoadedModel, runner: ModelRunner, pool: BlockPool) -> None:
    """Raises ModelRefused. A model that is right without the engine's short cuts is served without them."""
    try:
        check_exactness(loaded, runner, pool)
    except ModelRefused as refused:
        runner.compute_all_rows()
        without = "cutting the last layer to the rows that are read"
        if loaded.backend.restore_layers(loaded.model):
            without += " and the engine's own decoder layers"
        check_exactness(loaded, runner, pool)
        log.warning("served more slowly, without %s: otherwise %s", without, refused)


def check_exactness(loaded: LoadedModel, runner: ModelRunner, pool: BlockPool) -> None:
    """Raises ModelRefused when the paged forward and the model's own differ. Leaves the pool as it was."""
    if _length(loaded.info) < 3:
        return
    check = _Check(loaded, runner, pool)
    try:
        check.as_it_is()
        check.past_thresholds()
    except ModelRefused as refused:
        raise ModelRefused(f"{loaded.info.name} is refused: {refused.message}", field="model.path") from refused


def _length(info: ModelInfo) -> int:
    return min(_TOKENS, info.max_model_len)


@dataclass(frozen=True)
class _Case:
    """A sequence and the logits that transformers gives for it."""

    ids: list[int]
    positions: list[int]
    # Logits of the last token, or of the last two where the last one was generated. [1 or 2, V]
    wanted: Tensor


class _Shifted(Sequence):
    """A sequence whose tokens are not where their positions say."""

    at: list[int]

    def positions(self, start: int, end: int) -> list[int]:
        return self.at[start:end]


class _Check:
    def __init__(self, loaded: LoadedModel, runner: ModelRunner, pool: BlockPool) -> None:
        self._model: Any = loaded.model
        self._loaded, self._runner, self._pool = loaded, runner, pool
        generator = torch.Generator().manual_seed(0)
        self._length, self._last = _length(loaded.info), loaded.info.max_model_len - 1
        self._ids = torch.randint(0, loaded.info.vocab_size, (3 * self._length,), generator=generator).tolist()
        self._lengths = {
            name: length
            for name, length in named_lengths(self._model, _TOKENS, loaded.info.max_model_len).items()
            # The limit itself, which nothing passes.
            if not (length > self._last and "position" in name)
        }

    def as_it_is(self) -> None:
        self._compare()

    def past_thresholds(self) -> None:
        """The same with the lengths that the configuration names made short, those that matter to the model."""
        thresholds = self._thresholds()
        if not thresholds:
            return
        try:
            self._compare_shortened(thresholds)
        except ModelRefused as refused:
            names = " or ".join(f"{name} = {length}" for name, length in thresholds.items())
            raise ModelRefused(
                f"where a sequence passes {names} of its configuration, {refused.message}; "
                f"model.max_model_len: {min(thresholds.values()) - 1} keeps every sequence below"
            ) from refused

    def _compare_shortened(self, thresholds: dict[str, int]) -> None:
        options = self._loaded.options
        before = dict(options)
        with shortened(self._model, thresholds):
            try:
                options.update(examine(self._model).options)
                self._compare()
            finally:
                options.update(before)

    def _compare(self) -> None:
        long = self._generated(self._ids[: self._length - 1], 2)
        short, far = self._generated(self._ids[-(self._length // 2) :], 1), self._far()
        error = self._error(long, short, far)
        if error <= (tolerance := _TOLERANCE[self._loaded.info.fingerprint.dtype]):
            return
        words = f"its paged logits differ from transformers' by {error:.1e} (relative)"
        if self._error_at_once(long) <= tolerance:
            words += (
                " where a prompt is cut or shares a step with others: it takes positions from the rows of a step, "
                "mixes them, or keeps state that is not keys and values"
            )
        raise ModelRefused(words)

    def _generated(self, prompt: list[int], tokens: int) -> _Case:
        """A prompt and all but the last of some tokens more, as `generate` does it. Raises ModelRefused."""
        plan = GenerationConfig(
            max_new_tokens=tokens,
            do_sample=False,
            # No token ends it.
            eos_token_id=self._loaded.info.vocab_size,
            pad_token_id=0,
            use_cache=True,
            disable_compile=True,
            output_logits=True,
            return_dict_in_generate=True,
        )
        given = torch.tensor([prompt], device=self._model.device)
        with refusing("transformers' own generate"), as_transformers(self._model):
            output = self._model.generate(given, attention_mask=torch.ones_like(given), generation_config=plan)
        require_keys_and_values(output)
        ids = output.sequences[0, :-1].tolist()
        return _Case(ids, list(range(len(ids))), torch.cat(output.logits))

    def _far(self) -> _Case:
        """Tokens at positions on both sides of every length that the configuration names, up to the last one."""
        length = self._length
        edges = {edge for named in self._lengths.values() for edge in (named - 1, named, named + 1, 2 * named + 1)}
        within = sorted(edge for edge in edges if edge < self._last)
        step = max(1, -(-len(within) // max(1, length - 2)))
        positions = [*within[::step][: length - 2], self._last]
        ids = self._ids[length : length + len(positions)]
        return _Case(ids, positions, self._own(ids, positions)[-1:])

    def _own(self, ids: list[int], positions: list[int] | None) -> Tensor:
        """transformers' logits of every token, all at once, plain attention. [T, V]"""
        tokens = torch.tensor([ids], device=self._model.device)
        given = {} if positions is None else {"position_ids": torch.tensor([positions], device=self._model.device)}
        where = "" if positions is None else f" up to position {positions[-1]}"
        with refusing(f"transformers' own forward pass{where}"), as_transformers(self._model):
            output = self._model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False, **given)
        logits: Tensor = output.logits[0]
        return logits

    def _error(self, long: _Case, short: _Case, far: _Case) -> float:
        """The largest relative error, over chunks of prompts and a decode step, side by side in two sequences."""
        prompt_len = len(long.ids) - 1
        half = prompt_len // 2
        with self._sequence(long, prompt_len) as first, refusing("a paged forward pass"):
            self._runner.run(StepPlan([Chunk(first, 0, half)]))
            with self._sequence(short, len(short.ids)) as second:
                chunks = [Chunk(second, 0, len(short.ids)), Chunk(first, half, prompt_len)]
                ends = self._runner.run(StepPlan(chunks)).logits_RxV
            with self._sequence(far, len(far.ids)) as second:
                chunks = [Chunk(first, prompt_len, prompt_len + 1), Chunk(second, 0, len(far.ids))]
                beside = self._runner.run(StepPlan(chunks)).logits_RxV
        return _relative_error(torch.cat([ends, beside]), torch.cat([short.wanted, long.wanted, far.wanted]))

    def _error_at_once(self, long: _Case) -> float:
        """The same for a prompt in one chunk, with no other beside it."""
        prompt_len = len(long.ids) - 1
        with self._sequence(long, prompt_len) as sequence, refusing("a paged forward pass"):
            logits = self._runner.run(StepPlan([Chunk(sequence, 0, prompt_len)])).logits_RxV
        return _relative_error(logits, long.wanted[:1])

    @contextmanager
    def _sequence(self, case: _Case, prompt_len: int) -> Iterator[Sequence]:
        request = EngineRequest("self-check", tuple(case.ids[:prompt_len]), SamplingParams(max_tokens=2))
        table = self._pool.acquire(self._pool.blocks_for(len(case.ids)))
        assert table is not None
        sequence = _Shifted(request, lambda event: None, True, table=table, output_ids=case.ids[prompt_len:])
        sequence.at = case.positions
        try:
            yield sequence
        finally:
            table.release()

    def _thresholds(self) -> dict[str, int]:
        """Lengths that the configuration names and that matter to prompts longer than SHORT alone."""
        if not self._lengths:
            return {}

        def logits() -> tuple[Tensor, Tensor]:
            """Those of a long prompt and a token more, whose keys come from transformers' cache; of a short prompt."""
            long = self._generated(self._ids[: self._length - 1], 2)
            return long.wanted, self._own(self._ids[: SHORT - 2], None)  # some count from one less

        wanted = logits()

        def matter(lengths: dict[str, int]) -> bool | None:
            """None: some are something else than lengths."""
            try:
                with shortened(self._model, lengths):
                    long, short = (_relative_error(*pair) <= _SAME for pair in zip(logits(), wanted, strict=True))
            except ModelRefused:
                return None
            return None if not short else not long

        together = matter(self._lengths)
        if together is None:
            return {name: length for name, length in self._lengths.items() if matter({name: length})}
        return self._lengths if together else {}


def _relative_error(got: Tensor, wanted: Tensor) -> float:
    """The largest of any row, of what sampling sees: a number that is added to all logits changes nothing, and a token
    that is out of reach, such as a banned one, need only be so in both. Raises ModelRefused for a row of no numbers.
    """
    got, wanted = got.double(), wanted.double()
    best = wanted.amax(dim=-1, keepdim=True)
    if not bool(best.isfinite().all()):
        raise ModelRefused("transformers' own logits are not numbers (NaN or infinite), as some of its weights may be")
    reachable = wanted > best - _OUT_OF_REACH
    if not bool(((got > got.amax(dim=-1, keepdim=True) - _OUT_OF_REACH) == reachable).all()):
        return float("inf")
    got, wanted = (_centred(logits, reachable) for logits in (got, wanted))
    return float(((got - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp_min(_LEAST_SPREAD)).max())


def _centred(logits: Tensor, reachable: Tensor) -> Tensor:
    """Zero on average, and where they are out of reach."""
    kept = logits.masked_fill(~reachable, 0.0)
    mean = kept.sum(dim=-1, keepdim=True) / reachable.sum(dim=-1, keepdim=True)
    return (kept - mean).masked_fill(~reachable, 0.0)
