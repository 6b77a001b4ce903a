"""Fusing a model for CPU changes its speed, not what it computes."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen3Config,
)
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from tandem.engine.backends.cpu import fusion
from tandem.engine.backends.cpu.fusion import fuse_for_cpu
from tandem.engine.backends.cpu.kernels.matmul import gated_product
from tandem.engine.backends.cpu.kernels.tile import registers_suffice
from tandem.engine.backends.cpu.memory import tune_allocator, use_huge_pages
from tandem.engine.backends.cpu.modules import PackedLinear

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
# The config, and how many modules of each kind its two layers and its output must give.
MODELS: dict[str, tuple[Callable[[], PreTrainedConfig], dict[str, int]]] = {
    "llama": (lambda: LlamaConfig(**SMALL), {"gated_mlp": 2, "linear": 9, "rms_norm": 5, "rotary": 2}),
    "llama-tied": (
        lambda: LlamaConfig(**SMALL, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
        {"gated_mlp": 2, "linear": 9, "rms_norm": 5, "rotary": 2},
    ),
    "qwen3": (
        lambda: Qwen3Config(**SMALL, head_dim=16),
        {"gated_mlp": 2, "linear": 9, "rms_norm": 9, "rotary": 2},
    ),
    "gemma2": (
        lambda: Gemma2Config(**SMALL, head_dim=16, sliding_window=5, query_pre_attn_scalar=16),
        {"gated_mlp": 2, "linear": 9, "rms_norm": 9, "rotary": 2},
    ),
    "phi3": (lambda: Phi3Config(**SMALL), {"gated_mlp": 2, "linear": 5, "rms_norm": 5, "rotary": 2}),
    "mixtral": (
        lambda: MixtralConfig(**SMALL, num_local_experts=4),
        {"linear": 9, "rms_norm": 5, "rotary": 2},
    ),
    "gpt2": (
        lambda: GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=101, n_positions=64),
        {"linear": 9},
    ),
}


def make_model(config: PreTrainedConfig) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms of ones and biases of zeros would hide a mix-up
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def logits(model: Any, ids_BxT: Tensor) -> Tensor:
    with torch.inference_mode():
        out: Tensor = model(input_ids=ids_BxT, use_cache=False).logits
    return out


@pytest.mark.parametrize("name", MODELS)
def test_a_fused_model_computes_the_same(name: str) -> None:
    make_config, kinds = MODELS[name]
    model = make_model(make_config())
    prompts = [torch.randint(1, 101, (1, rows)) for rows in (1, 2, 17, 64)]
    before = [logits(model, ids) for ids in prompts]
    report = fuse_for_cpu(model)
    assert report.fused == kinds
    assert report.left_alone == {}
    for ids, want in zip(prompts, before, strict=True):
        torch.testing.assert_close(logits(model, ids), want, rtol=2e-5, atol=2e-5 * want.abs().max().item())


def test_two_sequences_side_by_side_are_both_computed() -> None:
    model = make_model(LlamaConfig(**SMALL))
    ids = torch.randint(1, 101, (2, 9))
    want = logits(model, ids)
    fuse_for_cpu(model)
    torch.testing.assert_close(logits(model, ids), want, rtol=2e-5, atol=2e-5 * want.abs().max().item())


def test_fused_tokens_are_those_of_generate() -> None:
    model = make_model(LlamaConfig(**SMALL))
    ids = torch.randint(1, 101, (1, 9))
    want = model.generate(ids, do_sample=False, max_new_tokens=40)
    fuse_for_cpu(model)
    assert torch.equal(model.generate(ids, do_sample=False, max_new_tokens=40), want)


def test_a_tied_output_is_copied_and_the_embedding_stays() -> None:
    tied = make_model(LlamaConfig(**SMALL, tie_word_embeddings=True))
    report = fuse_for_cpu(tied)
    assert report.copied_bytes == 101 * 64 * 4
    assert isinstance(tied.lm_head, PackedLinear)
    assert type(tied.model.embed_tokens) is nn.Embedding
    assert fuse_for_cpu(make_model(LlamaConfig(**SMALL))).copied_bytes == 0


def test_a_tied_output_too_large_to_copy_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion, "MAX_TIED_COPY_BYTES", 100)
    model = make_model(LlamaConfig(**SMALL, tie_word_embeddings=True))
    report = fuse_for_cpu(model)
    assert list(report.left_alone) == ["lm_head"]
    assert report.fused["linear"] == 8
    assert type(model.lm_head) is nn.Linear


def test_bf16_is_left_alone() -> None:
    model = make_model(LlamaConfig(**SMALL)).to(torch.bfloat16)
    ids = torch.randint(1, 101, (1, 9))
    before = logits(model, ids)
    report = fuse_for_cpu(model)
    assert set(report.fused) <= {"rotary"}
    assert torch.equal(logits(model, ids), before)


def test_fusing_one_model_changes_no_other() -> None:
    original = modeling_llama.apply_rotary_pos_emb
    other, model = make_model(LlamaConfig(**SMALL)), make_model(LlamaConfig(**SMALL))
    ids = torch.randint(1, 101, (1, 9))
    before = logits(other, ids)
    fuse_for_cpu(model)
    assert modeling_llama.apply_rotary_pos_emb is original
    assert torch.equal(logits(other, ids), before)


class ScaledMLP(LlamaMLP):
    """Has the parts of a gated MLP, and computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x) * 1.001
        return out


class CentredRMSNorm(LlamaRMSNorm):
    """Called RMSNorm, and computes something else."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        out: Tensor = super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))
        return out


def test_what_computes_something_else_is_kept() -> None:
    model = make_model(LlamaConfig(**SMALL))
    first = model.model.layers[0]
    first.mlp, first.input_layernorm = ScaledMLP(model.config), CentredRMSNorm(64)
    report = fuse_for_cpu(model)
    assert report.left_alone == {
        "model.layers.0.mlp": "computes something else",
        "model.layers.0.input_layernorm": "computes something else",
    }
    assert type(first.mlp) is ScaledMLP
    assert type(first.mlp.up_proj) is PackedLinear, "its parts are linear layers all the same"


def test_a_module_with_hooks_is_kept() -> None:
    model = make_model(LlamaConfig(**SMALL))
    model.lm_head.register_forward_hook(lambda module, args, output: output)
    assert fuse_for_cpu(model).left_alone == {"lm_head": "has hooks"}


@pytest.mark.parametrize("rows", [1, 7, 33, 49, 8192])
def test_packed_parts_take_any_number_of_rows(rows: int) -> None:
    config = LlamaConfig(**SMALL)
    parts = nn.ModuleDict(
        {"linear": nn.Linear(64, 31), "mlp": LlamaMLP(config), "norm": LlamaRMSNorm(64), "gemma": Gemma2RMSNorm(64)}
    )
    x = torch.randn(1, rows, 64)
    with torch.inference_mode():
        before = {name: part(x) for name, part in parts.items()}
        assert sum(fuse_for_cpu(parts).fused.values()) == 4
        for name, part in parts.items():
            torch.testing.assert_close(part(x), before[name], rtol=1e-5, atol=1e-5)
            assert torch.equal(part(x.transpose(0, 1).contiguous().transpose(0, 1)), part(x))


@pytest.mark.skipif(not registers_suffice(), reason="the tiles are cut for AVX-512")
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 64), (96, 192), (300, 64), (500, 64)])
def test_rows_are_multiplied_exactly(inputs: int, outputs: int) -> None:
    torch.manual_seed(0)
    linear = PackedLinear(torch.randn(outputs, inputs), torch.randn(outputs))
    other = PackedLinear(torch.randn(outputs, inputs), None)
    assert linear.address, "oneDNN's layout is not the one that matmul.py reads"
    whole = torch.randn(250, inputs)
    unit = torch.eye(inputs)  # the weights themselves, by way of oneDNN
    weights = [
        torch.ops.mkldnn._linear_pointwise(unit, m.weight, None, "none", [], "").double() for m in (linear, other)
    ]
    assert linear.bias is not None
    first, second = whole.double() @ weights[0] + linear.bias, whole.double() @ weights[1]
    for rows in (*range(1, 62), 119, 120, 121, 250):  # few; many in one block, in two, in three
        x = whole[:rows]
        close = {"rtol": 1e-5, "atol": 1e-4}
        torch.testing.assert_close(linear(x).double(), first[:rows], **close)
        gated = gated_product(x, linear, other)
        want = torch.nn.functional.silu(first[:rows]) * second[:rows]
        torch.testing.assert_close(gated.double(), want, rtol=1e-5, atol=1e-3)


@pytest.mark.skipif(not registers_suffice(), reason="the tiles are cut for AVX-512")
def test_a_row_does_not_depend_on_the_rows_beside_it_or_on_threads() -> None:
    linear = PackedLinear(torch.randn(192, 400), None)
    assert linear.address
    x = torch.randn(250, 400)
    threads = torch.get_num_threads()
    want = linear(x)
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        try:
            assert torch.equal(torch.cat([linear(row) for row in x.split(1)]), want)
            assert torch.equal(torch.cat([linear(rows) for rows in x.split(13)]), want)
            assert torch.equal(torch.cat([linear(rows) for rows in x.split(61)]), want)
        finally:
            torch.set_num_threads(threads)


@pytest.fixture
def _allocator_left_as_it_was() -> Iterator[None]:
    yield
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 65536)  # M_MMAP_MAX and M_TRIM_THRESHOLD: glibc's defaults
        mallopt(-1, 128 << 10)
    tune_allocator.cache_clear()


@pytest.mark.usefixtures("_allocator_left_as_it_was")
def test_the_allocator_is_tuned_once() -> None:
    assert tune_allocator() == (platform.libc_ver()[0] == "glibc")
    assert tune_allocator() == tune_allocator()


def test_huge_pages_keep_what_memory_holds() -> None:
    tensor = torch.arange(4 << 20, dtype=torch.int64)
    assert use_huge_pages() % (2 << 20) == 0
    assert torch.equal(tensor, torch.arange(4 << 20, dtype=torch.int64))


class GatedRMSNorm(LlamaRMSNorm):  # type: ignore[misc]
    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        normed: Tensor = super().forward(hidden_states)
        return normed if gate is None else normed * gate


def test_a_norm_that_takes_a_gate_too_stays_what_it_is() -> None:
    model = nn.Sequential(GatedRMSNorm(64), LlamaRMSNorm(64)).eval()
    assert fuse_for_cpu(model).fused == {"rms_norm": 1}
    assert type(model[0]) is GatedRMSNorm
