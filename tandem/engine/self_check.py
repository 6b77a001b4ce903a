"""Before a model is served: do paged chunks and a paged decode step give the model's own logits?

Catches whatever the probe cannot see, such as state that passes between tokens outside of attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tandem.engine import attention
from tandem.engine.block_pool import BlockPool
from tandem.engine.model_loader import LoadedModel
from tandem.engine.model_runner import ModelRunner
from tandem.engine.scheduler import Chunk, StepPlan
from tandem.engine.sequence import Sequence
from tandem.errors import ModelRefused
from tandem.types import EngineRequest, ModelInfo, SamplingParams

# Relative L2 error of a row of logits: reassociation in float32 gives 1e-6, rounding in half precision 1e-2; another
# computation gives about 1.
_TOLERANCE = {"float32": 1e-3, "float16": 0.2, "bfloat16": 0.2}
_PROMPT_TOKENS = 24


def tokens_checked(info: ModelInfo) -> int:
    """Of which the pool must hold the KV."""
    return min(_PROMPT_TOKENS + 1, info.max_model_len)


def check_exactness(loaded: LoadedModel, runner: ModelRunner, pool: BlockPool) -> None:
    """Raises ModelRefused when the paged forward and the model's own differ. Leaves the pool as it was."""
    length = tokens_checked(loaded.info) - 1
    if length < 2:
        return
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, loaded.info.vocab_size, (length + 1,), generator=generator).tolist()
    error = _relative_error(_paged(runner, pool, ids), _own(loaded.model, ids))
    if not error <= _TOLERANCE[loaded.info.fingerprint.dtype]:
        raise ModelRefused(
            f"{loaded.info.name} is refused: its paged logits differ from transformers' by {error:.1e} (relative)",
            field="model.path",
        )


def _own(model: Any, ids: list[int]) -> Tensor:
    """transformers' logits of the last two positions, all tokens at once, plain attention."""
    device = next(model.parameters()).device
    model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            output = model(input_ids=torch.tensor([ids], device=device), use_cache=False, logits_to_keep=2)
    finally:
        model.set_attn_implementation(attention.NAME)
    logits: Tensor = output.logits[0]
    return logits


def _paged(runner: ModelRunner, pool: BlockPool, ids: list[int]) -> Tensor:
    """The same two rows from two prompt chunks and one decode step."""
    request = EngineRequest("self-check", tuple(ids[:-1]), SamplingParams(max_tokens=2))
    table = pool.acquire(pool.blocks_for(len(ids)))
    assert table is not None
    sequence = Sequence(request, lambda event: None, decode_here=True, table=table, output_ids=ids[-1:])
    try:
        return torch.cat([runner.run(plan).logits_RxV for plan in _plans(sequence)])
    finally:
        table.release()


def _plans(sequence: Sequence) -> Any:
    half, whole = sequence.prompt_len // 2, sequence.prompt_len
    yield StepPlan([], [Chunk(sequence, 0, half)])
    yield StepPlan([], [Chunk(sequence, half, whole)])
    sequence.num_computed = whole
    yield StepPlan([sequence], [])


def _relative_error(got: Tensor, wanted: Tensor) -> float:
    difference = (got.double() - wanted.double()).norm(dim=-1) / wanted.double().norm(dim=-1)
    return float(difference.max())
