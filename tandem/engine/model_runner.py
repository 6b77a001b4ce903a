"""Runs one step's tokens through the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tandem.engine.attention import PagedAttention, Step
from tandem.engine.batch import PagedBatch
from tandem.engine.kv_cache import KVCache
from tandem.engine.last_layer import LastLayer
from tandem.engine.model_loader import LoadedModel
from tandem.engine.scheduler import StepPlan


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
        self._cache = cache
        self._device = torch.device(device)
        self._block_size = loaded.info.fingerprint.block_size
        self._attention, self._write = _functions(device)

    def run(self, plan: StepPlan, layer_written: Callable[[int], None] = lambda layer: None) -> StepOutput:
        """layer_written: told of each layer as soon as its K and V are in the pool."""
        rows = _rows(plan)
        positions = [position for _, start, end in rows for position in range(start, end)]
        ids = [token for sequence, start, end in rows for token in sequence.token_ids(start, end)]
        batch = self._batch(rows)
        sampled, pooled = _sampled_rows(plan, batch), _pooled_rows(plan, batch)
        with torch.inference_mode():
            tail = self._last_layer.tail(sorted({*sampled, *pooled}), batch)
            step = Step(batch, self._cache.layer, self._options, self._attention, self._write, layer_written, tail)
            with self._last_layer.only(tail):
                if not pooled:
                    logits = self._forward(ids, positions, step, sampled)
                    return StepOutput(logits, logits.new_empty(0, 0))
                with _last_hidden_state(self._model) as seen:
                    logits = self._forward(ids, positions, step, sampled)
                return StepOutput(logits, seen[0][0, pooled])

    def _forward(self, ids: list[int], positions: list[int], step: Step, sampled: list[int]) -> Tensor:
        # The head always gets a row: kernels need not cope with none.
        keep = sampled or [len(ids) - 1]
        output = self._model(
            input_ids=self._tensor(ids, torch.long).unsqueeze(0),
            position_ids=self._tensor(positions, torch.long).unsqueeze(0),
            use_cache=False,
            logits_to_keep=self._tensor(keep, torch.long),
            paged=step,
        )
        logits: Tensor = output.logits[0, : len(sampled)]
        return logits

    def _batch(self, rows: list[tuple[Any, int, int]]) -> PagedBatch:
        starts, slots = [0], []
        for sequence, start, end in rows:
            starts.append(starts[-1] + end - start)
            blocks, size = sequence.table.blocks, self._block_size
            slots += [blocks[position // size] * size + position % size for position in range(start, end)]
        context_lens = [end for _, _, end in rows]
        return PagedBatch(
            num_decodes=sum(1 for sequence, start, _ in rows if start >= sequence.prompt_len),
            query_starts=starts,
            context_lens=context_lens,
            block_table_BxM=self._block_table(rows),
            context_lens_B=self._tensor(context_lens, torch.int32),
            slots_T=self._tensor(slots, torch.long),
            query_starts_B1=self._tensor(starts, torch.int32),
        )

    def _block_table(self, rows: list[tuple[Any, int, int]]) -> Tensor:
        used = [sequence.table.blocks[: -(-end // self._block_size)] for sequence, _, end in rows]
        width = max(map(len, used))
        return self._tensor([[*blocks, *[0] * (width - len(blocks))] for blocks in used], torch.int32)

    def _tensor(self, values: list[Any], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self._device)


def _rows(plan: StepPlan) -> list[tuple[Any, int, int]]:
    """(sequence, first position, end position) of every sequence in the step, decodes first."""
    decodes = [(sequence, sequence.num_computed, sequence.num_computed + 1) for sequence in plan.decodes]
    return [*decodes, *((chunk.sequence, chunk.start, chunk.end) for chunk in plan.chunks)]


def _sampled_rows(plan: StepPlan, batch: PagedBatch) -> list[int]:
    """Rows of the flattened tokens whose logits are needed: every decode, and the last token of finished prompts."""
    first_chunk = len(plan.decodes)
    ends = [batch.query_starts[first_chunk + index + 1] - 1 for index, chunk in enumerate(plan.chunks) if chunk.samples]
    return [*range(first_chunk), *ends]


def _pooled_rows(plan: StepPlan, batch: PagedBatch) -> list[int]:
    """Rows of the flattened tokens whose final hidden states are needed, in the order of plan.pooled."""
    starts = batch.query_starts[len(plan.decodes) :]
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
    from tandem.engine.cpu_attention import paged_attention_cpu, write_kv

    if device == "cpu":
        return paged_attention_cpu, write_kv
    from tandem.engine.cuda_attention import paged_attention_cuda

    return paged_attention_cuda, write_kv
