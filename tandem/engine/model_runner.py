"""Runs one step's tokens through the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tandem.engine.attention import PagedStep
from tandem.engine.batch import PagedBatch
from tandem.engine.kv_cache import KVCache
from tandem.engine.loading.last_layer import LastLayer
from tandem.engine.loading.model_loader import LoadedModel
from tandem.engine.scheduler import Chunk, StepPlan


@dataclass(frozen=True)
class StepOutput:
    # Logits of plan.sampled, in that order; R may be 0.
    logits_RxV: Tensor
    # Final hidden states of what plan.pooled wants, in that order; E may be 0.
    hidden_ExD: Tensor


class ModelRunner:
    """Turns a StepPlan into one flattened row of tokens, and that into logits and hidden states."""

    def __init__(self, loaded: LoadedModel, cache: KVCache) -> None:
        """Changes the model's last layer in place: after fusing, and once."""
        self._model: Any = loaded.model
        self._last_layer = LastLayer(loaded.model, loaded.last_attention)
        self._options = loaded.options
        # Always of the same layout; another one may be put in between steps.
        self.cache = cache
        self._backend = loaded.backend
        self._block_size = loaded.info.fingerprint.block_size

    def run(self, plan: StepPlan, layer_written: Callable[[int], None] = lambda layer: None) -> StepOutput:
        """layer_written: told of each layer as soon as its K and V are in the pool."""
        inputs = self._inputs(plan)
        sampled, pooled = inputs.sampled, inputs.pooled
        with torch.inference_mode():
            tail = self._last_layer.tail(sorted({*sampled, *pooled}), inputs.batch, self._backend)
            step = PagedStep(
                self._backend, inputs.batch, self.cache.layer, self._options, layer_written, tail, plan.written
            )
            with self._last_layer.only(tail):
                if not pooled:
                    logits = self._forward(inputs, step)
                    return StepOutput(logits, logits.new_empty(0, 0))
                with _last_hidden_state(self._model) as seen:
                    logits = self._forward(inputs, step)
                return StepOutput(logits, seen[0][0, pooled])

    def compute_all_rows(self) -> None:
        """From now on the last layer computes every row, whether it is read or not."""
        self._last_layer.restore()

    def _forward(self, inputs: _Inputs, step: PagedStep) -> Tensor:
        output = self._model(
            input_ids=inputs.ids_T.unsqueeze(0),
            position_ids=inputs.positions_T.unsqueeze(0),
            use_cache=False,
            logits_to_keep=inputs.kept_R,
            paged=step,
        )
        logits: Tensor = output.logits[0, : len(inputs.sampled)]
        return logits

    def _inputs(self, plan: StepPlan) -> _Inputs:
        """One copy takes all of it to the device."""
        starts, ids, positions, slots = [0], list[int](), list[int](), list[int]()
        size, used = self._block_size, list[tuple[int, ...]]()
        for chunk in plan.chunks:
            assert chunk.sequence.table is not None
            blocks = chunk.sequence.table.blocks[: -(-chunk.end // size)]
            used.append(blocks)
            starts.append(starts[-1] + chunk.end - chunk.start)
            ids += chunk.sequence.token_ids(chunk.start, chunk.end)
            positions += chunk.sequence.positions(chunk.start, chunk.end)
            slots += [blocks[at // size] * size + at % size for at in range(chunk.start, chunk.end)]
        table = np.zeros((len(used), max(map(len, used))), np.int32)
        for row, blocks in enumerate(used):
            table[row, : len(blocks)] = blocks
        context_lens = [chunk.end for chunk in plan.chunks]
        sampled = _rows(plan, starts, lambda chunk: chunk.sampled)
        # The head always gets a row: kernels need not cope with none.
        kept = sampled or [len(ids) - 1]
        ids_T, positions_T, slots_T, kept_R, starts_B1, context_lens_B, table_BxM = self._backend.send(
            *(np.array(part, np.int64) for part in (ids, positions, slots, kept)),
            *(np.array(part, np.int32) for part in (starts, context_lens)),
            table,
        )
        batch = PagedBatch(
            num_decodes=len(plan.decodes),
            query_starts=starts,
            context_lens=context_lens,
            block_table_BxM=table_BxM,
            context_lens_B=context_lens_B,
            slots_T=slots_T,
            query_starts_B1=starts_B1,
        )
        return _Inputs(ids_T, positions_T, kept_R, batch, sampled, _rows(plan, starts, lambda chunk: chunk.pooled))


@dataclass(frozen=True)
class _Inputs:
    """What a forward pass takes."""

    # Int64, on the device. R: rows that go through the head, one at least.
    ids_T: Tensor
    positions_T: Tensor
    kept_R: Tensor
    batch: PagedBatch
    # Rows whose logits, and whose final hidden states, are wanted.
    sampled: list[int]
    pooled: list[int]


def _rows(plan: StepPlan, starts: list[int], wanted: Callable[[Chunk], range]) -> list[int]:
    """Rows of the flattened tokens at the positions that are wanted of each chunk."""
    places = zip(starts, plan.chunks, strict=False)
    return [start + position - chunk.start for start, chunk in places for position in wanted(chunk)]


@contextmanager
def _last_hidden_state(model: Any) -> Iterator[list[Tensor]]:
    """Collects what forwards inside hand to the head: [1, T, D], after the final norm."""
    seen: list[Tensor] = []
    handle = model.base_model.register_forward_hook(lambda _module, _inputs, out: seen.append(out.last_hidden_state))
    try:
        yield seen
    finally:
        handle.remove()
