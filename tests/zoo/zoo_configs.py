"""A tiny configuration of every causal language model that the installed transformers knows.

What is small is said by field, not by model: a field's name means the same in nearly all configurations. The few models
whose fields must fit together in a way of their own are in _OWN.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ARCHITECTURES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
LAYERS = 4
VOCABULARY = 128
# Longer than the longest prompt and its answer.
POSITIONS = 512

_SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim", "embedding_size"), 64),
    **dict.fromkeys(("word_embed_proj_dim", "input_embedding_size", "output_embedding_size", "lru_width"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "dff", "dim_ff"), 128),
    **dict.fromkeys(("ffn_hidden_size", "intermediate_size_mlp", "dense_intermediate_size", "feed_forward_size"), 128),
    "d_inner": 128,
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"), 64),
    **dict.fromkeys(("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"), 64),
    "shared_intermediate_size": 64,
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), LAYERS),
    # transformers counts caches by the encoder's.
    **dict.fromkeys(("encoder_layers", "num_decoder_layers", "num_encoder_layers"), LAYERS),
    **dict.fromkeys(("depth", "num_global_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "kv_n_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "dim_head", "d_head", "kv_channels", "attention_head_size"), 32),
    **dict.fromkeys(("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("pronunciation_vocab_size", "shape_vocab_size"), 64),
    **dict.fromkeys(("pronunciation_embed_dim", "shape_embed_dim"), 32),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), POSITIONS),
    **dict.fromkeys(("model_max_length", "max_target_positions"), POSITIONS),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("zero_expert_num", "num_expert_group", "n_group"), 2),
    **dict.fromkeys(("topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "index_head_dim", "adapter_rank"), 32),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("o_lora_rank", "router_hidden_size", "d_rel", "laurel_rank", "gated_norm_rank", "hc_lowrank"), 16),
    **dict.fromkeys(("index_n_heads", "o_groups", "hc_count", "hc_mult", "altup_num_inputs"), 2),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_heads", "n_mamba_heads", "num_query_groups"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 16),
    **dict.fromkeys(("linear_num_value_heads", "mamba_n_heads", "mamba_num_heads", "time_step_rank"), 4),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "mamba_dt_rank"), 16),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 32),
    **dict.fromkeys(("n_groups", "mamba_n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("hidden_size_per_layer_input", "rotary_dim"), 16),
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
    "is_decoder": True,
}
# The others stay off where a configuration has them off.
_ALWAYS = {"head_dim", "num_key_value_heads", "is_decoder", "bos_token_id", "eos_token_id", "pad_token_id"}
# Of encoders for pictures and sound, which answer no prompt of tokens: small only to be quick.
_ENCODERS: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "num_codebooks": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
    "output_channels": 16,
    "adapter_in_dim": 64,
    "adapter_input_size": 64,
    "adapter_out_dim": 64,
    "ext_pw_out_channel": 16,
    "depthwise_separable_out_channel": 16,
    "nemo_conv_channels": 16,
    "per_layer_config": {},
}


# Parts that answer a prompt of tokens.
_TEXT_PARTS = ("text_config", "decoder")
# What fits together in a way of the model's own; of the text part, where there are several.
_INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 32, "indexer_budget": 64}
_ALIKE: dict[str, Any] = {"per_layer_config": {}}
_OWN: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "blenderbot": {"encoder_layers": LAYERS},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {"num_key_value_heads": 4, "head_dim": 32, **_ALIKE},
    "dots3_note_text": {"num_key_value_heads": 4, "head_dim": 32, **_ALIKE},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_expand": 2},
    "gemma3n": {"num_kv_shared_layers": 0},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    **dict.fromkeys(("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"), _ALIKE),
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "attention_layers": ["global", "local"] * 2},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "helium": {"head_dim": 16},
    "xmod": {"default_language": "en_XX"},
    "bamba": {"attn_layer_indices": [1, 3]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "qwen4_exp": {**_INDEXER, "indexer_compress_ratio": 4},
    "qwen4_exp_text": {**_INDEXER, "indexer_compress_ratio": 4},
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [16, 32]},
    "xlnet": {"d_head": 16},
    "zamba2": {"n_mamba_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}


# What a default configuration needs to be one at all.
_NO_LAYER_INPUT = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
_START: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {"text_config": {"model_type": "gemma4_text", **_NO_LAYER_INPUT}},
}


def tiny(architecture: str, **changes: Any) -> PreTrainedConfig:
    """The configuration with these fields changed, in the text part where there are several.

    Raises whatever transformers raises where they make no configuration.
    """
    kind = CONFIG_MAPPING[architecture]
    default = _default(architecture)
    small = _smaller(default, _SMALL)
    text = _text_part(small)
    text.update(_all_kinds(_text_part(default), small))
    for name, value in {**_OWN.get(architecture, {}), **changes}.items():
        text[name] = {**text[name], **value} if isinstance(text.get(name), dict) else value
    return kind(**small)


def text_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of the text part."""
    return _text_part(config.to_dict())


@cache
def _default(architecture: str) -> dict[str, Any]:
    kind = CONFIG_MAPPING[architecture]
    default: dict[str, Any] = kind(**_START.get(architecture, {})).to_dict()
    return default


def _text_part(fields: dict[str, Any]) -> dict[str, Any]:
    """What generation runs on: a part of its own, or all."""
    return next((fields[name] for name in _TEXT_PARTS if name in fields), fields)


def _smaller(default: dict[str, Any], table: dict[str, Any]) -> dict[str, Any]:
    """Small values for the fields that there are, part by part."""
    small = {
        name: min(value, table[name]) if isinstance(value, int) and name not in _ALWAYS else table[name]
        for name, value in default.items()
        if name in table and (value or name in _ALWAYS)
    }
    if "head_dim" in small and "qk_rope_head_dim" in small:
        small["head_dim"] = small["qk_rope_head_dim"]  # another name of it there
    if "kv_lora_rank" in small and "num_key_value_heads" in small:
        small["num_key_value_heads"] = small["num_attention_heads"]
    for name, value in default.items():
        if isinstance(value, dict) and "model_type" in value:
            small[name] = _smaller(value, table if name in _TEXT_PARTS else {**table, **_ENCODERS})
    return small


def _all_kinds(default: dict[str, Any], small: dict[str, Any]) -> dict[str, Any]:
    """Lists with an entry a layer, cut so that every kind of layer is there."""
    cut = {}
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        if kinds := list(dict.fromkeys(default.get(name) or [])):
            cut[name] = [kinds[layer % len(kinds)] for layer in range(LAYERS)]
    return cut
