"""How large a KV pool is: as configured, or what a GPU has left beside the model and its largest step."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from tandem.config import EngineConfig
from tandem.engine.backends.cuda.attention import why_not_flash, why_not_pages
from tandem.engine.block_pool import BlockPool, BlockTable
from tandem.engine.kv_cache import DTYPES, KVCache, block_bytes
from tandem.engine.loading.model_loader import LoadedModel
from tandem.engine.model_runner import ModelRunner
from tandem.engine.sampler import Sampler
from tandem.engine.scheduler import Chunk, StepPlan
from tandem.engine.sequence import Sequence
from tandem.errors import ConfigError, ModelRefused
from tandem.out_of_memory import is_out_of_memory
from tandem.types import EngineRequest, SamplingParams

log = logging.getLogger(__name__)

# Of the GPU's memory, left alone: for what torch's allocator cannot place, and for libraries.
SPARE_SHARE = 0.05
# What makes sampling take the most memory.
_SAMPLING = SamplingParams(max_tokens=2, temperature=1.0, top_p=0.9, seed=0)


def blocks_left(config: EngineConfig, loaded: LoadedModel, runner: ModelRunner, sampler: Sampler) -> int:
    """Blocks for which a GPU has room beside the largest step, which is run to see.

    Raises ConfigError when there is no room for such a step.
    """
    fingerprint = loaded.info.fingerprint
    plan, tables, pool = _largest_step(config, loaded)
    torch.cuda.empty_cache()
    try:
        runner.cache = KVCache(fingerprint, pool.num_blocks, config.device)
        peak = _peak_of(lambda: _run(plan, runner, sampler))
    except Exception as error:
        if not (is_out_of_memory(error) or isinstance(error, ModelRefused)):  # the second says it of a pool
            raise
        raise ConfigError(
            f"the GPU has no room for a step of engine.max_step_tokens ({config.max_step_tokens}) and "
            f"engine.max_running ({config.max_running}) beside the model: lower them",
            field="engine.max_step_tokens",
        ) from None
    finally:
        runner.cache = KVCache(fingerprint, 0, config.device)
        for table in tables:
            table.release()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    room = free - peak - int(SPARE_SHARE * total)
    bytes_each = block_bytes(fingerprint)
    if attention_obstacles(loaded):
        # A layer's share of all contexts of a step is gathered beside the pool.
        bytes_each += -(-bytes_each // fingerprint.num_layers)
    log.info(
        "of %d MiB on the GPU %d are free, and the largest step takes %d: %d are for KV",
        *(total >> 20, free >> 20, peak >> 20, max(0, room) >> 20),
    )
    return max(0, room) // bytes_each


def attention_obstacles(loaded: LoadedModel) -> set[str]:
    """Why attention on the GPU does not read the pool's pages in place; empty if it does, in every layer."""
    fingerprint, capability = loaded.info.fingerprint, torch.cuda.get_device_capability()
    dtype = DTYPES[fingerprint.dtype]
    layers = (why_not_flash(dtype, fingerprint.head_dim, options, capability) for options in loaded.options.values())
    return {why for why in (*layers, why_not_pages(fingerprint.block_size)) if why}


def _peak_of(run: Callable[[], object]) -> int:
    """Bytes that a call takes beside what is there before, at most."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _run(plan: StepPlan, runner: ModelRunner, sampler: Sampler) -> None:
    with torch.inference_mode():
        sampler.sample(runner.run(plan).logits_RxV, plan.sampled)


def _largest_step(config: EngineConfig, loaded: LoadedModel) -> tuple[StepPlan, list[BlockTable], BlockPool]:
    """As many decodes as may run, and prompts for the rest; their KV is nobody's, so decodes share a block."""
    size, longest = loaded.info.fingerprint.block_size, loaded.info.max_model_len
    num_decodes = min(config.max_running, config.max_step_tokens)
    left = config.max_step_tokens - num_decodes
    lengths = [min(longest, left - start) for start in range(0, left, longest)]
    pool = BlockPool(-(-2 // size) + sum(-(-length // size) for length in lengths), size, prefix_cache=False)
    tables: list[BlockTable] = []

    def table_for(tokens: int) -> BlockTable:
        table = pool.acquire(pool.blocks_for(tokens))
        assert table is not None
        tables.append(table)
        return table

    shared = table_for(2)
    decodes = [_sequence(1, shared, num_computed=1) for _ in range(num_decodes)]
    chunks = [Chunk(_sequence(length, table_for(length)), 0, length) for length in lengths]
    return StepPlan(decodes, chunks), tables, pool


def _sequence(prompt_len: int, table: BlockTable, num_computed: int = 0) -> Sequence:
    """Computed prompts have their first token."""
    request = EngineRequest("largest-step", (0,) * prompt_len, _SAMPLING)
    output_ids = [0] if num_computed else []
    return Sequence(request, lambda event: None, True, table=table, num_computed=num_computed, output_ids=output_ids)
