"""A checkpoint is whole: what its files lack is refused by name, what they hold beyond that is said once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine_driver import EngineDriver
from model_zoo import ARCHITECTURES, save_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from tandem.errors import ModelRefused
from tandem.types import SamplingParams

Weights = dict[str, Tensor]
Change = Callable[[Weights], None]
PROMPT = list(range(5, 25))


def saved(folder: Path, architecture: str = "llama", change: Change = lambda weights: None, **settings: object) -> Path:
    """A checkpoint whose file holds what `change` leaves, and whose configuration has these settings."""
    save_model(architecture, folder)
    path = folder / "model.safetensors"
    weights = {name: weight.clone() for name, weight in load_file(path).items()}
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})
    edit(folder / "config.json", settings)
    return folder


def edit(path: Path, settings: dict[str, object]) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def without(*names: str) -> Change:
    def change(weights: Weights) -> None:
        for name in names:
            del weights[name]

    return change


def refusal(folder: Path) -> str:
    with pytest.raises(ModelRefused) as caught:
        EngineDriver(folder)
    assert caught.value.field == "model.path"
    assert "\n" not in caught.value.message
    return caught.value.message


def served(folder: Path) -> list[int]:
    return EngineDriver(folder).generate([PROMPT], SamplingParams(max_tokens=6, ignore_eos=True))[0]


@pytest.mark.parametrize(
    ("architecture", "gone"),
    [
        ("llama", "model.layers.2.mlp.down_proj.weight"),
        ("llama", "model.norm.weight"),
        ("llama", "model.embed_tokens.weight"),
        ("llama", "lm_head.weight"),
        ("qwen2", "model.layers.0.self_attn.k_proj.bias"),
        ("gpt_neox", "gpt_neox.layers.1.input_layernorm.bias"),
        ("gpt2", "transformer.h.0.mlp.c_fc.weight"),
        ("mixtral", "model.layers.0.block_sparse_moe.gate.weight"),
    ],
)
def test_a_missing_weight_is_named(architecture: str, gone: str, tmp_path: Path) -> None:
    message = refusal(saved(tmp_path, architecture, without(gone)))
    assert "its files lack 1 tensor that the model needs" in message
    assert gone.replace("block_sparse_moe", "mlp") in message


def test_a_missing_persistent_buffer_is_named(tmp_path: Path) -> None:
    """Not a parameter: zeros until a checkpoint fills it, and experts are chosen by it."""
    moe = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
    config = AutoConfig.for_model("glm4_moe", **ARCHITECTURES["llama"], **moe, n_group=1, topk_group=1)
    model = AutoModelForCausalLM.from_config(config)
    buffers = dict(model.named_buffers())
    [gone] = [name for name in model.state_dict() if name in buffers and ".1." in name]
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[gone]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert f"its files lack 1 tensor that the model needs: {gone}" in refusal(tmp_path)


def test_of_many_the_first_are_named_and_all_counted(tmp_path: Path) -> None:
    message = refusal(saved(tmp_path, num_hidden_layers=5))
    assert "its files lack 18 tensors that the model needs: model.layers.3.self_attn.q_proj.weight, " in message
    assert message.endswith(", ...")


@pytest.mark.parametrize("gone", [["w1"], ["w1", "w3"], ["w2"], ["w1", "w2", "w3"]])
def test_a_missing_expert_is_named_by_what_it_is_part_of(gone: list[str], tmp_path: Path) -> None:
    """transformers fuses the experts' weights when it loads them."""
    experts = "model.layers.1.block_sparse_moe.experts.2."
    message = refusal(saved(tmp_path, "mixtral", without(*(f"{experts}{name}.weight" for name in gone))))
    assert "model.layers.1.mlp.experts." in message


def test_a_shape_that_differs_is_named_with_both(tmp_path: Path) -> None:
    def change(weights: Weights) -> None:
        weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(96, 64)

    message = refusal(saved(tmp_path, change=change))
    assert "1 tensor of its files differ in shape" in message
    assert "model.layers.1.mlp.up_proj.weight is [96, 64], not [128, 64]" in message


def test_a_vocabulary_of_another_size_is_refused(tmp_path: Path) -> None:
    message = refusal(saved(tmp_path, vocab_size=160))
    assert "model.embed_tokens.weight is [128, 64], not [160, 64]" in message


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_a_large_model_beside_small_weights_is_refused_before_it_takes_memory(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 7 B or more, of which transformers would fill nearly all with random numbers."""
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    folder = saved(tmp_path, architecture, **sizes, **heads)
    loaded = []
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *given, **settings: loaded.append(given))
    message = refusal(folder)
    assert loaded == []
    assert "tensors that the model needs: model.layers.3.self_attn.q_proj.weight" in message
    assert "model.embed_tokens.weight is [128, 64], not [128, 4096]" in message


def test_headers_say_what_the_load_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Word for word; and what cannot be foreseen is left to the load."""
    folders = [
        saved(tmp_path / "llama", "llama", without("model.norm.weight"), intermediate_size=96),
        saved(tmp_path / "mixtral", "mixtral", without("model.layers.1.block_sparse_moe.experts.2.w1.weight")),
        saved(tmp_path / "tied", "llama", without("lm_head.weight", "model.embed_tokens.weight")),
    ]
    edit(folders[2] / "config.json", {"tie_word_embeddings": True})
    foreseen = [refusal(folder) for folder in folders]
    monkeypatch.setattr("tandem.engine.loading.checkpoint._headers", lambda source, config: {})
    assert [refusal(folder) for folder in folders] == foreseen


def test_tied_weights_are_needed_once(tmp_path: Path) -> None:
    """Either of the two will do; both may be there, the same or not."""
    whole = served(saved(tmp_path / "untied", tie_word_embeddings=False))

    def tie(weights: Weights) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

    def only_head(weights: Weights) -> None:
        tie(weights)
        del weights["model.embed_tokens.weight"]

    tied = served(saved(tmp_path / "both", change=tie, tie_word_embeddings=True))
    assert tied != whole
    assert served(saved(tmp_path / "tied", change=without("lm_head.weight"), tie_word_embeddings=True)) == tied
    assert served(saved(tmp_path / "head", change=only_head, tie_word_embeddings=True)) == tied
    neither = saved(tmp_path / "neither", change=without("lm_head.weight", "model.embed_tokens.weight"))
    edit(neither / "config.json", {"tie_word_embeddings": True})
    assert "model.embed_tokens.weight" in refusal(neither)


def test_a_checkpoint_of_the_base_model_needs_a_tied_head(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    model = AutoModel.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert "its files lack 1 tensor that the model needs: lm_head.weight" in refusal(tmp_path)
    edit(tmp_path / "config.json", {"tie_word_embeddings": True})
    assert len(served(tmp_path)) == 6


def test_what_is_not_used_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    def change(weights: Weights) -> None:
        weights["model.layers.0.self_attn.q_norm.weight"] = torch.ones(32)

    assert len(served(saved(tmp_path, change=change))) == 6
    said = caplog.text + capfd.readouterr().err
    assert said.count("model.layers.0.self_attn.q_norm.weight") == 1
    assert "the model does not use 1 tensor of its files: model.layers.0.self_attn.q_norm.weight" in said


def sharded(folder: Path) -> list[Path]:
    save_model("llama", folder)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="150KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    return shards


def test_a_shard_that_is_not_there_is_named(tmp_path: Path) -> None:
    lost = sharded(tmp_path)[1]
    lost.unlink()
    assert lost.name in refusal(tmp_path)


def test_an_index_without_one_of_its_shards_is_refused_by_tensor(tmp_path: Path) -> None:
    lost = sharded(tmp_path)[1]
    index = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit(index, {"weight_map": {name: file for name, file in weight_map.items() if file != lost.name}})
    gone = next(name for name, file in weight_map.items() if file == lost.name)
    assert gone in refusal(tmp_path)


def test_a_tensor_that_the_index_names_and_no_shard_holds_is_refused_by_name(tmp_path: Path) -> None:
    shard = sharded(tmp_path)[1]
    weights = load_file(shard)
    gone = sorted(weights)[0]
    del weights[gone]
    save_file(weights, shard, metadata={"format": "pt"})
    assert f"its files lack 1 tensor that the model needs: {gone}" in refusal(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_file_that_was_cut_off_is_named(kept: int, tmp_path: Path) -> None:
    shard = sharded(tmp_path)[1]
    shard.write_bytes(shard.read_bytes()[:kept])
    assert shard.name in refusal(tmp_path)
