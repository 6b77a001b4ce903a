"""The last layer's cut: the logits stay transformers' own, unread rows cost nothing, mixing rows is noticed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from model_zoo import save_model
from torch import Tensor, nn
from transformers import BertGenerationConfig, BertGenerationDecoder

from tandem.config import parse_config
from tandem.engine.block_pool import BlockPool
from tandem.engine.engine import Engine
from tandem.engine.kv_cache import KVCache
from tandem.engine.loading.last_layer import LastLayer
from tandem.engine.loading.model_loader import LoadedModel, load_model
from tandem.engine.loading.self_check import check_exactness
from tandem.engine.model_runner import ModelRunner

HIDDEN = 64


def load(architecture: str, folder: Path) -> LoadedModel:
    return load_model(parse_config({"model": {"path": str(save_model(architecture, folder))}}))


def last_layer(loaded: LoadedModel) -> Any:
    model: Any = loaded.model
    return model.transformer.h[-1] if hasattr(model, "transformer") else model.base_model.layers[-1]


def count_rows(module: nn.Module) -> list[int]:
    """The number of rows of each call to come."""
    rows: list[int] = []
    module.register_forward_pre_hook(lambda _module, inputs: rows.append(inputs[0].numel() // HIDDEN))
    return rows


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "phi3", "mixtral"])
def test_unread_rows_are_not_computed(architecture: str, tmp_path: Path) -> None:
    loaded = load(architecture, tmp_path)
    layer = last_layer(loaded)
    within_mlp = count_rows(next(layer.mlp.children()))
    fingerprint = loaded.info.fingerprint
    pool = BlockPool(8, fingerprint.block_size, prefix_cache=False)
    runner = ModelRunner(loaded, KVCache(fingerprint, 8, loaded.backend))
    within_mlp.clear()  # what the runner tried out
    check_exactness(loaded, runner, pool)
    # Half a prompt, the rest of it beside another one, and a decode beside a third.
    assert within_mlp[-3:] == [1, 2, 2]


def test_what_the_cut_leaves_is_written_to_the_cache_by_all_rows(tmp_path: Path) -> None:
    loaded = load("llama", tmp_path)
    attention = last_layer(loaded).self_attn
    keys = count_rows(attention.k_proj)
    fingerprint = loaded.info.fingerprint
    runner = ModelRunner(loaded, KVCache(fingerprint, 8, loaded.backend))
    check_exactness(loaded, runner, BlockPool(8, fingerprint.block_size, prefix_cache=False))
    assert keys[-3:] == [7, 8 + 8, 1 + 1]


class Shifted(nn.Module):
    """Every row also depends on the one before it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(x + x.roll(1, dims=1))


def test_a_module_that_mixes_rows_is_left_whole(tmp_path: Path) -> None:
    loaded = load("llama", tmp_path)
    layer = last_layer(loaded)
    layer.mlp = Shifted(layer.mlp)
    LastLayer(loaded.model, loaded.last_attention)
    assert "forward" not in vars(layer.mlp)
    assert "forward" in vars(layer.self_attn.o_proj)


def test_a_module_that_wants_more_than_rows_is_left_whole(tmp_path: Path) -> None:
    """As in BERT's layers, whose output takes the residual too."""
    settings = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    config = BertGenerationConfig(vocab_size=128, is_decoder=True, max_position_embeddings=64, **settings)
    BertGenerationDecoder(config).save_pretrained(tmp_path)
    model = {"path": str(tmp_path)}
    engine = Engine(parse_config({"model": model, "engine": {"kv_memory_mib": 4}}), lambda emissions: None)
    assert engine.fingerprint.num_layers == 2
