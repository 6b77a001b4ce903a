"""How large a KV pool is: as configured, or what a GPU has left beside the model and its largest step."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from tandem.config import MOST_BLOCKS, EngineConfig
from tandem.engine.block_pool import BlockPool, BlockTable
from tandem.engine.kv_cache import KVCache, block_bytes
from tandem.engine.loading.model_loader import LoadedModel
from tandem.engine.loading.self_check import tokens_checked
from tandem.engine.model_runner import ModelRunner
from tandem.engine.sampler import Sampler
from tandem.engine.scheduler import Chunk, StepPlan
from tandem.engine.sequence import Sequence
from tandem.errors import ConfigError, ModelRefused
from tandem.out_of_memory import is_out_of_memory
from tandem.types import EngineRequest, Fingerprint, SamplingParams

log = logging.getLogger(__name__)

# What makes sampling take the most memory.
_SAMPLING = SamplingParams(max_tokens=2, temperature=1.0, top_p=0.9, seed=0)


def size_pool(config: EngineConfig, loaded: LoadedModel, runner: ModelRunner, sampler: Sampler) -> int:
    """Blocks of the pool. Raises ConfigError when it would be too small for anything. Logs what is worth knowing."""
    fingerprint, longest = loaded.info.fingerprint, loaded.info.max_model_len
    kinds = set(loaded.options.values())
    if obstacles := loaded.backend.attention_obstacles(fingerprint, kinds):
        log.warning("attention copies keys and values together in every step, which is slow: %s", "; ".join(obstacles))
    least = tokens_checked(loaded.info)
    blocks = count_blocks(config, fingerprint, least, lambda: blocks_left(config, loaded, runner, sampler))
    if (held := blocks * fingerprint.block_size) < longest:
        log.warning(
            "the KV pool holds %d tokens: longer requests are refused, though the model takes %d; "
            "for those engine.num_blocks must be %d or more",
            *(held, longest, -(-longest // fingerprint.block_size)),
        )
    return blocks


def count_blocks(
    config: EngineConfig, fingerprint: Fingerprint, least_tokens: int, left: Callable[[], int] = lambda: 0
) -> int:
    """Blocks in the pool. `left` finds for how many the device has room, where the configuration leaves that open.

    Raises ConfigError when they do not hold the KV of least_tokens.
    """
    least = -(-least_tokens // fingerprint.block_size)
    if config.num_blocks:
        if config.num_blocks < least:
            raise ConfigError(
                f"engine.num_blocks must be {least} or more, not {config.num_blocks}: the check of the model at load "
                f"takes {least_tokens} tokens, a block holds {fingerprint.block_size}",
                field="engine.num_blocks",
            )
        return config.num_blocks
    bytes_each = block_bytes(fingerprint)
    mib = -(-least * bytes_each >> 20)
    if not config.kv_memory_mib:
        blocks = min(left(), MOST_BLOCKS)
        if blocks < least:
            raise ConfigError(
                f"the GPU has room for {blocks} KV blocks of {bytes_each} bytes beside the model and its largest step, "
                f"and the check of the model at load takes {least}: lower engine.max_step_tokens or engine.max_running",
                field="engine.max_step_tokens",
            )
        return blocks
    blocks = (config.kv_memory_mib << 20) // bytes_each
    if blocks < least:
        raise ConfigError(
            f"engine.kv_memory_mib must be {mib} or more, not {config.kv_memory_mib}: the check of the model at load "
            f"takes {least_tokens} tokens, a KV block of {fingerprint.block_size} takes {bytes_each} bytes",
            field="engine.kv_memory_mib",
        )
    return blocks


def blocks_left(config: EngineConfig, loaded: LoadedModel, runner: ModelRunner, sampler: Sampler) -> int:
    """Blocks for which the device has room beside the largest step, which is run to see.

    Raises ConfigError when there is no room for such a step.
    """
    fingerprint, backend = loaded.info.fingerprint, loaded.backend
    plan, tables, pool = _largest_step(config, loaded)
    backend.free_memory()
    try:
        runner.cache = KVCache(fingerprint, pool.num_blocks, backend)
        peak = backend.peak_bytes(lambda: run_step(plan, runner, sampler))
    except Exception as error:
        if not (is_out_of_memory(error) or isinstance(error, ModelRefused)):  # the second says it of a pool
            raise
        raise ConfigError(
            f"the GPU has no room for a step of engine.max_step_tokens ({config.max_step_tokens}) and "
            f"engine.max_running ({config.max_running}) beside the model: lower them",
            field="engine.max_step_tokens",
        ) from None
    finally:
        runner.cache = KVCache(fingerprint, 0, backend)
        for table in tables:
            table.release()
    bytes_each = block_bytes(fingerprint)
    if backend.attention_obstacles(fingerprint, set(loaded.options.values())):
        # A layer's share of all contexts of a step is gathered beside the pool.
        bytes_each += -(-bytes_each // fingerprint.num_layers)
    return backend.bytes_left(peak) // bytes_each


def run_step(plan: StepPlan, runner: ModelRunner, sampler: Sampler) -> None:
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
    decodes = [Chunk(_sequence(1, shared, output_ids=[0]), 1, 2) for _ in range(num_decodes)]
    prefills = [Chunk(_sequence(length, table_for(length)), 0, length) for length in lengths]
    return StepPlan(decodes + prefills), tables, pool


def _sequence(prompt_len: int, table: BlockTable, output_ids: list[int] | None = None) -> Sequence:
    request = EngineRequest("largest-step", (0,) * prompt_len, _SAMPLING)
    return Sequence(request, lambda event: None, True, table=table, output_ids=output_ids or [])
