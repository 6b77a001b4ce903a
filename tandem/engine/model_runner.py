"""Runs one step's tokens through the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tandem.engine.attention import PagedAttention, Step
from tandem.engine.batch import PagedBatch
from tandem.engine.kv_cache import KVCache
from tandem.engine.loading.last_layer import LastLayer
from tandem.engine.loading.model_loader import LoadedModel
from tandem.engine.scheduler import StepPlan
from tandem.engine.sending import send


@dataclass(frozen=True)
class StepOutput:
    # One row per sequence of plan.sampled, in that order; R may be 0.
    logits_RxV: Tensor
    # Final hidden states of what plan.pooled wants, in that order; E may be 0.
    hidden_ExD: Tensor


class ModelRunner:
    """Turns a StepPlan into one flattened row of tokens, and that into logits and hidden states."""

    def __init__(self, loaded: LoadedModel, cache: KVCache, device: str) -> None:
        """Changes the model's last layer in place: after fusing, and once."""
        self._model: Any = loaded.model
        self._last_layer = LastLayer(loaded.model, loaded.last_attention)
        self._options = loaded.options
        # Of the same layout always; another one may be put in between steps.
        self.cache = cache
        self._device = torch.device(device)
        self._block_size = loaded.info.fingerprint.block_size
        self._attention, self._write = _functions(device)

    def run(
        self, plan: StepPlan, layer_written: Callable[[int], None] = lambda layer: None, written: int = 0
    ) -> StepOutput:
        """layer_written: told of each layer as soon as its K and V are in the pool. written: see Step."""
        inputs = self._inputs(plan)
        sampled, pooled = inputs.sampled, inputs.pooled
        with torch.inference_mode():
            tail = self._last_layer.tail(sorted({*sampled, *pooled}), inputs.batch)
            pools, options = self.cache.layer, self._options
            step = Step(inputs.batch, pools, options, self._attention, self._write, layer_written, tail, written)
            with self._last_layer.only(tail):
                if not pooled:
                    logits = self._forward(inputs, step)
                    return StepOutput(logits, logits.new_empty(0, 0))
                with _last_hidden_state(self._model) as seen:
                    logits = self._forward(inputs, step)
                return StepOutput(logits, seen[0][0, pooled])

    def compute_all_rows(self) -> None:
        """Of the last layer too, whether they are read or not."""
        self._last_layer.restore()

    def _forward(self, inputs: _Inputs, step: Step) -> Tensor:
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
        rows = _rows(plan)
        starts: list[int] = [0]
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        for sequence, start, end in rows:
            starts.append(starts[-1] + end - start)
            blocks, size = sequence.table.blocks, self._block_size
            ids += sequence.token_ids(start, end)
            positions += sequence.positions(start, end)
            slots += [blocks[position // size] * size + position % size for position in range(start, end)]
        context_lens = [end for _, _, end in rows]
        sampled = _sampled_rows(plan, starts)
        # The head always gets a row: kernels need not cope with none.
        kept = sampled or [len(ids) - 1]
        ids_T, positions_T, slots_T, kept_R, starts_B1, context_lens_B, table_BxM = send(
            self._device,
            *(np.array(part, np.int64) for part in (ids, positions, slots, kept)),
            *(np.array(part, np.int32) for part in (starts, context_lens)),
            self._block_table(rows),
        )
        batch = PagedBatch(
            num_decodes=sum(1 for sequence, start, _ in rows if start >= sequence.prompt_len),
            query_starts=starts,
            context_lens=context_lens,
            block_table_BxM=table_BxM,
            context_lens_B=context_lens_B,
            slots_T=slots_T,
            query_starts_B1=starts_B1,
        )
        return _Inputs(ids_T, positions_T, kept_R, batch, sampled, _pooled_rows(plan, starts))

    def _block_table(self, rows: list[tuple[Any, int, int]]) -> NDArray[np.int32]:
        used = [sequence.table.blocks[: -(-end // self._block_size)] for sequence, _, end in rows]
        table = np.zeros((len(used), max(map(len, used))), np.int32)
        for row, blocks in enumerate(used):
            table[row, : len(blocks)] = blocks
        return table


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


def _rows(plan: StepPlan) -> list[tuple[Any, int, int]]:
    """(sequence, first position, end position) of every sequence in the step, decodes first."""
    decodes = [(sequence, sequence.num_computed, sequence.num_computed + 1) for sequence in plan.decodes]
    return [*decodes, *((chunk.sequence, chunk.start, chunk.end) for chunk in plan.chunks)]


def _sampled_rows(plan: StepPlan, query_starts: list[int]) -> list[int]:
    """Rows of the flattened tokens whose logits are needed: every decode, and the last token of finished prompts."""
    first_chunk = len(plan.decodes)
    ends = [query_starts[first_chunk + index + 1] - 1 for index, chunk in enumerate(plan.chunks) if chunk.samples]
    return [*range(first_chunk), *ends]


def _pooled_rows(plan: StepPlan, query_starts: list[int]) -> list[int]:
    """Rows of the flattened tokens whose final hidden states are needed, in the order of plan.pooled."""
    starts = query_starts[len(plan.decodes) :]
    return [
        start + position - chunk.start
        for start, chunk in zip(starts, plan.chunks, strict=False)
        for position in chunk.pooled
    ]


@contextmanager
def _last_hidden_state(model: Any) -> Iterator[list[Tensor]]:
    """Collects what forwards inside hand to the head: [1, T, D], after the final norm."""
    seen: list[Tensor] = []
    handle = model.base_model.register_forward_hook(lambda _module, _inputs, out: seen.append(out.last_hidden_state))
    try:
        yield seen
    finally:
        handle.remove()


def _functions(device: str) -> tuple[PagedAttention, Any]:
    # Imported late: one device's kernels must not be needed, or compiled, on the other.
    from tandem.engine.backends.cpu.attention import paged_attention_cpu, write_kv

    if device == "cpu":
        return paged_attention_cpu, write_kv
    from tandem.engine.backends.cuda.attention import paged_attention_cuda

    return paged_attention_cuda, write_kv
