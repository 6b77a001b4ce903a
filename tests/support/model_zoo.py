"""Tiny random-weight models of many architectures, saved like real checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

# Shapes that the CPU kernels take: whole blocks of 64 outputs.
_COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MHA = {key: value for key, value in _COMMON.items() if key not in ("num_key_value_heads", "head_dim")}
_MOE = {"num_experts_per_tok": 2, "num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 32}
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]

# Windows are shorter than the longest test prompts, so that sliding attention is exercised.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": _COMMON,
    "mistral": {**_COMMON, "sliding_window": 24},
    "qwen2": _COMMON,
    "qwen3": _COMMON,
    "gemma2": {
        **_COMMON,
        "tie_word_embeddings": False,
        "sliding_window": 24,
        "attn_logit_softcapping": 5.0,
        "query_pre_attn_scalar": 16,
    },
    "gemma3_text": {
        **_COMMON,
        "tie_word_embeddings": False,
        "sliding_window": 24,
        "layer_types": _SLIDING,
        "query_pre_attn_scalar": 16,
    },
    "phi3": {**_MHA, "num_key_value_heads": 2},
    "gpt2": {
        "vocab_size": 128,
        "n_embd": 64,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt_neox": _MHA,
    "olmo2": _COMMON,
    "mixtral": {**_COMMON, **_MOE, "sliding_window": 24},
    "qwen3_moe": {**_COMMON, **_MOE},
}


def save_model(architecture: str, folder: Path, seed: int = 0) -> Path:
    """Writes config.json and model.safetensors of a random model; returns the folder."""
    return save_random(AutoConfig.for_model(architecture, **ARCHITECTURES[architecture]), folder, seed)


def save_random(
    config: PreTrainedConfig,
    folder: Path,
    seed: int = 0,
    size: float = 0.1,
    embeddings: float = 0.1,
    vectors: float = 0.0,
) -> Path:
    """The same of any configuration; size and embeddings: standard deviations of weights.

    They are larger than usual (0.1, not 0.02), so that random models have clear favourites and attention matters. By
    `vectors` is moved what begins as zeros or ones (biases, norms, a router's correction), so that it matters too.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    saved = model.state_dict()
    with torch.no_grad():
        # Tied weights once, as embeddings.
        for name, weight in [*model.named_parameters(), *model.named_buffers()]:
            if name not in saved or not weight.is_floating_point():
                continue
            if weight.ndim > 1 and "norm" not in name:
                weight.normal_(0.0, embeddings if "embed" in name or "wte" in name else size)
            elif vectors:
                weight.add_(torch.randn_like(weight) * vectors)
    model.save_pretrained(folder)
    # Where the model is a part, it saves the part's.
    config.save_pretrained(folder)
    return folder
