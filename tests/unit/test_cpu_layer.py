"""A decoder layer in our own launches computes what its parts computed, in steps of every kind, and no row that nobody
reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import ARCHITECTURES, save_model
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tandem.config import parse_config
from tandem.engine.backends.cpu.fusion import fuse_for_cpu
from tandem.engine.backends.cpu.kernels.tile import registers_suffice
from tandem.engine.backends.cpu.layer import FusedLayer
from tandem.engine.block_pool import BlockPool
from tandem.engine.kv_cache import KVCache
from tandem.engine.loading.model_loader import LoadedModel, load_model
from tandem.engine.model_runner import ModelRunner
from tandem.engine.scheduler import Chunk, StepPlan
from tandem.engine.sequence import Sequence
from tandem.types import EngineRequest, SamplingParams

pytestmark = pytest.mark.skipif(not registers_suffice(), reason="the tiles are cut for AVX-512")

SMALL: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 101,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "heads of 16": LlamaConfig(**SMALL, head_dim=16),
    "heads of 64": LlamaConfig(**{**SMALL, "num_key_value_heads": 1}, head_dim=64),
    "heads of 128": LlamaConfig(**{**SMALL, "num_key_value_heads": 2}, head_dim=128),
    "heads of 256": LlamaConfig(**{**SMALL, "num_key_value_heads": 2}, head_dim=256),
    "biases": LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "biases of some": Qwen2Config(**SMALL),
}
PROMPTS = (1, 7, 130)


def load(config: PreTrainedConfig, folder: Path) -> LoadedModel:
    config.architectures = [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[config.model_type]]
    config.save_pretrained(folder)
    loaded = load_model(parse_config({"model": {"path": str(folder), "load_format": "dummy"}}))
    with torch.no_grad():
        for parameter in loaded.model.parameters():  # norms of ones and biases of zeros would hide a mix-up
            parameter.add_(0.2 * torch.randn_like(parameter))
    return loaded


class Bench:
    """Runs steps of a model over a pool of its own."""

    def __init__(self, loaded: LoadedModel) -> None:
        fingerprint = loaded.info.fingerprint
        self._pool = BlockPool(64, fingerprint.block_size, prefix_cache=False)
        self.cache = KVCache(fingerprint, 64, loaded.backend)
        self._runner = ModelRunner(loaded, self.cache)

    def logits(self, chunk: int) -> list[Tensor]:
        """Of all prompts' last tokens and two decode steps more; prompts in chunks of so many tokens, side by side."""
        generator = torch.Generator().manual_seed(3)
        sequences = [self._sequence(torch.randint(1, 101, (n + 2,), generator=generator).tolist()) for n in PROMPTS]
        seen: list[Tensor] = []
        for start in range(0, max(PROMPTS), chunk):
            chunks = [Chunk(s, start, min(start + chunk, s.prompt_len)) for s in sequences if start < s.prompt_len]
            seen += self._runner.run(StepPlan(chunks)).logits_RxV.unbind()
        for after in range(2):
            decodes = [Chunk(s, s.prompt_len + after, s.prompt_len + after + 1) for s in sequences]
            seen += self._runner.run(StepPlan(decodes)).logits_RxV.unbind()
        for sequence in sequences:
            assert sequence.table is not None
            sequence.table.release()
        return seen

    def _sequence(self, ids: list[int]) -> Sequence:
        request = EngineRequest("test", tuple(ids[:-2]), SamplingParams(max_tokens=3))
        table = self._pool.acquire(self._pool.blocks_for(len(ids)))
        assert table is not None
        return Sequence(request, lambda event: None, decode_here=True, table=table, output_ids=ids[-2:])


def layers(model: Any) -> list[Any]:
    return list(model.model.layers)


def fused_layers(model: Any) -> list[FusedLayer]:
    forwards = [module.forward for module in model.modules()]
    return [forward for forward in forwards if isinstance(forward, FusedLayer)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_of_the_usual_form_are_fused(architecture: str, tmp_path: Path) -> None:
    loaded = load_model(parse_config({"model": {"path": str(save_model(architecture, tmp_path))}}))
    report = fuse_for_cpu(loaded.model)
    usual = architecture in ("llama", "mistral", "qwen2")
    assert report.fused.get("layer", 0) == len(fused_layers(loaded.model)) == (3 if usual else 0)
    if architecture == "qwen3":
        assert set(report.left_alone.values()) == {"has other parts than projections in its attention"}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_fused_layer_computes_the_same_in_steps_of_every_kind(name: str, tmp_path: Path) -> None:
    loaded = load(CONFIGS[name], tmp_path)
    fuse_for_cpu(loaded.model)
    assert len(fused_layers(loaded.model)) == 2
    fused = Bench(loaded)
    got = fused.logits(chunk=50)
    for layer in layers(loaded.model):
        del layer.forward
    parts = Bench(loaded)
    want = parts.logits(chunk=50)
    assert len(got) == len(want) > 2 * len(PROMPTS)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())
    torch.testing.assert_close(fused.cache.pool, parts.cache.pool, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["heads of 16", "heads of 128"])
def test_a_row_does_not_depend_on_the_cut_or_on_threads(name: str, tmp_path: Path) -> None:
    loaded = load(CONFIGS[name], tmp_path)
    fuse_for_cpu(loaded.model)
    bench, threads = Bench(loaded), torch.get_num_threads()
    last = -1 - 2 * len(PROMPTS)  # the end of the longest prompt, and two decode steps
    want = bench.logits(chunk=130)[last:]
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        try:
            for chunk in (130, 49, 13):
                assert all(map(torch.equal, bench.logits(chunk)[last:], want))
        finally:
            torch.set_num_threads(threads)


def test_rows_that_nobody_reads_are_not_computed(tmp_path: Path) -> None:
    loaded = load(CONFIGS["heads of 64"], tmp_path)
    fuse_for_cpu(loaded.model)
    bench = Bench(loaded)
    read: list[list[bool]] = []
    layers(loaded.model)[-1].register_forward_hook(
        lambda _module, _inputs, out: read.append(out[0].any(dim=-1).tolist())
    )
    bench.logits(chunk=130)
    ends = {sum(PROMPTS[: index + 1]) - 1 for index in range(len(PROMPTS))}
    assert read[0] == [row in ends for row in range(sum(PROMPTS))]
    assert read[1:] == [[True] * len(PROMPTS)] * 2


class Louder(LlamaDecoderLayer):
    """Has the parts of a layer of the usual form, and computes something else."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        out: Tensor = super().forward(hidden_states, **kwargs) * 1.001
        return out


def test_a_layer_that_computes_something_else_is_kept(tmp_path: Path) -> None:
    loaded = load(CONFIGS["biases"], tmp_path)
    first = layers(loaded.model)[0]
    first.__class__ = Louder
    report = fuse_for_cpu(loaded.model)
    assert report.left_alone == {"model.layers.0": "computes something else"}
    assert report.fused["layer"] == 1
    assert "forward" not in vars(first)


def test_heads_that_do_not_go_into_blocks_are_kept(tmp_path: Path) -> None:
    loaded = load(LlamaConfig(**SMALL, head_dim=48), tmp_path)
    report = fuse_for_cpu(loaded.model)
    assert set(report.left_alone.values()) == {"has heads of 48, which do not go into blocks of 64"}
    assert fused_layers(loaded.model) == []


def test_other_forwards_than_the_engines_go_the_old_way(tmp_path: Path) -> None:
    loaded = load(CONFIGS["biases"], tmp_path)
    model: Any = loaded.model
    ids = torch.randint(1, 101, (2, 9))
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        want = model(input_ids=ids, use_cache=False).logits
    model.set_attn_implementation("tandem_paged")
    fuse_for_cpu(model)
    assert len(fused_layers(model)) == 2
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, want, rtol=1e-4, atol=1e-4)
