"""Features of a configuration, to be switched on one by one: what a field of this name turns on in any model.

A feature is a name and the fields that it changes, from the fields that a tiny configuration has.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from zoo_configs import LAYERS, POSITIONS

Fields = dict[str, Any]
Feature = tuple[str, Fields]

# Shorter than most prompts, and not a multiple of a block or a chunk.
WINDOW = 27
# Crossed by the prompt of 90 tokens.
THRESHOLD = 64
# Room for that prompt and its answer: of longrope no more is served.
LONGROPE_ORIGINAL = 256

# What the base class has concerns outputs and training, but for these.
_OF_BASE = set(PreTrainedConfig().to_dict()) - {"tie_word_embeddings"}
_NOT_OF_THE_FUNCTION = re.compile(r"^use_cache$|^output_|aux_loss|dropout|jitter|initializer|init_|_init$|_std|^mtp_")
_SCALES = re.compile(r"multipl|scal|alpha|beta|pre_attn|depth$")
# Bounds, set to where they are felt.
_BOUNDS = re.compile(r"soft_?cap|clip|limit|cap$")
_FELT = 1.5
_WINDOWS = ("sliding_window", "sliding_window_size", "attention_window_size", "local_attention", "window_size")
_CHUNKS = ("attention_chunk_size", "local_attn_chunk_length", "lsh_attn_chunk_length", "chunk_size")
_THRESHOLDS = ("floor_scale", "log_scaling_n_floor", "original_max_position_embeddings", "keep_window_size")
_BUDGETS = ("index_topk", "index_topk_blocks", "indexer_budget", "rel_extent")
# What a field that is off by default is set to.
_OFF = {
    "attn_logit_softcapping": _FELT,
    "final_logit_softcapping": 3.0,
    "logits_soft_cap": 3.0,
    "clip_qkv": 0.5,
    "logit_scale": 0.3,
    "attention_multiplier": 0.3,
    "moe_router_logit_softcapping": 2.0,
    "num_kv_shared_layers": 2,
    "shared_intermediate_size": 64,
    "num_shared_experts": 1,
    "use_bidirectional_attention": True,
    "position_embedding_type": "rope",
    "moe_latent_size": 32,
    "hidden_size_per_layer_input": 16,
}
# Fields with a few values that have names.
_NAMED = {
    "attention_type": ("original_full",),
    "topk_method": ("group_limited_greedy",),
    "expert_selection_fn": ("sigmoid",),
    "shared_expert_combination_strategy": ("sum",),
    "hidden_act": ("gelu", "silu"),
    "hidden_activation": ("silu",),
    "activation_function": ("relu", "gelu"),
}


def features(fields: Fields) -> list[Feature]:
    """fields: of the text part of a tiny configuration. The first feature changes nothing."""
    found: list[Feature] = [("as it is", {})]
    for kind in _KINDS:
        found += kind(fields)
    return found


def _booleans(fields: Fields) -> Iterator[Feature]:
    for name, value in fields.items():
        if isinstance(value, bool) and name not in _OF_BASE and not _NOT_OF_THE_FUNCTION.search(name):
            yield f"{name}={not value}", {name: not value}


def _scales(fields: Fields) -> Iterator[Feature]:
    for name, value in fields.items():
        if name in _OF_BASE or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if not value or _NOT_OF_THE_FUNCTION.search(name) or name in _THRESHOLDS:
            continue
        if _BOUNDS.search(name):
            yield f"{name} {_FELT}", {name: _FELT}
        elif _SCALES.search(name):
            yield name, {name: type(value)(value * 1.7) or 1}


def _switches(fields: Fields) -> Iterator[Feature]:
    for name, value in _OFF.items():
        if name in fields and not fields[name]:
            yield name, {name: value}
    for name, values in _NAMED.items():
        for value in values:
            if name in fields and fields[name] not in (None, value):
                yield f"{name}={value}", {name: value}


def _heads(fields: Fields) -> Iterator[Feature]:
    heads, kv_heads = "num_attention_heads", "num_key_value_heads"
    if "kv_lora_rank" in fields:
        return
    if heads in fields and kv_heads in fields:
        yield "MHA", {kv_heads: fields[heads]}
        yield "MQA", {kv_heads: 1}
    if heads in fields and fields.get("head_dim"):
        yield "3 heads, 1 of keys", {"hidden_size": 96, heads: 3, kv_heads: 1}
        yield "head_dim 16", {"head_dim": 16}
        yield "head_dim 24", {"head_dim": 24}
        yield "odd sizes", {"hidden_size": 80, heads: 5, kv_heads: 5, "head_dim": 16, "intermediate_size": 144}
    elif heads in fields and "hidden_size" in fields:
        yield "3 heads", {"hidden_size": 96, heads: 3, **({kv_heads: 1} if kv_heads in fields else {})}
    elif {"n_head", "n_embd"} <= set(fields):
        yield "3 heads", {"n_embd": 96, "n_head": 3}
    if fields.get("num_kv_heads"):
        yield "MQA", {"num_kv_heads": 1}
    if "vocab_size" in fields:
        yield "odd vocabulary", {"vocab_size": 131}


def _windows(fields: Fields) -> Iterator[Feature]:
    for name in _WINDOWS:
        if name in fields:
            window = {name: WINDOW, **({"use_sliding_window": True} if "use_sliding_window" in fields else {})}
            if "max_window_layers" in fields:
                window["max_window_layers"] = 1
            kinds = fields.get("layer_types") or []
            if kinds and not any("sliding" in kind for kind in kinds) and name == "sliding_window":
                window["layer_types"] = _cycle("sliding_attention", "full_attention")
            yield f"{name} {WINDOW}", window
            if "layer_types" in window or any("sliding" in kind for kind in kinds):
                yield f"{name} {WINDOW} in all layers", {**window, "layer_types": _cycle("sliding_attention")}
    for name in _CHUNKS:
        if isinstance(fields.get(name), int) and fields[name] > 0:
            yield f"{name} 40", {name: 40}
            if "chunked_attention" in (fields.get("layer_types") or []):
                yield f"{name} 40 in all layers", {name: 40, "layer_types": _cycle("chunked_attention")}


def _layers(fields: Fields) -> Iterator[Feature]:
    for name in ("layer_types", "layers_block_type", "mlp_layer_types"):
        kinds = list(dict.fromkeys(fields.get(name) or []))
        for kind in kinds if len(kinds) > 1 else ():
            yield f"{name}: {kind}", {name: _cycle(kind)}
    if fields.get("layer_types") and "full_attention" not in fields["layer_types"]:
        yield "layer_types: full_attention", {"layer_types": _cycle("full_attention")}
    if "conv_L_cache" in fields and "conv" not in fields["layer_types"]:
        yield "layer_types: conv", {"layer_types": _cycle("conv", "full_attention")}
    if "no_rope_layers" in fields:
        yield "no_rope_layers: 2 of 4", {"no_rope_layers": [0, 1] * (LAYERS // 2)}
    if "mlp_only_layers" in fields:
        yield "mlp_only_layers", {"mlp_only_layers": [1]}
    if "decoder_sparse_step" in fields:
        yield "decoder_sparse_step 2", {"decoder_sparse_step": 2}
    if fields.get("n_group") == 1:
        yield "n_group 2", {"n_group": 2, "topk_group": 1}
    if "enable_moe_block" in fields:
        experts = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64}
        yield "enable_moe_block, 4 experts", {"enable_moe_block": True, **experts}


def _thresholds(fields: Fields) -> Iterator[Feature]:
    for name in _THRESHOLDS:
        if name in fields:
            yield f"{name} {THRESHOLD}", {name: THRESHOLD}
    if "floor_scale" in fields:
        yield "floor_scale 32, attn_scale 0.5", {"floor_scale": 32, "attn_scale": 0.5}
    for name in _BUDGETS:
        if isinstance(fields.get(name), int):
            yield f"{name} 8", {name: 8}


def _ropes(fields: Fields) -> Iterator[Feature]:
    rope = fields.get("rope_parameters")
    if not rope:
        return
    head_dim = fields.get("qk_rope_head_dim") or fields.get("head_dim") or _derived_head_dim(fields)
    for name, settings in _rope_types(int(head_dim * _rotary_share(rope))).items():
        yield f"rope {name}", _with_rope(fields, lambda kind, settings=settings: {**kind, **settings})
    yield "rope_theta 100", _with_rope(fields, lambda kind: {**kind, "rope_theta": 100.0})
    share = 1.0 if "partial_rotary_factor" in str(rope) else 0.5
    yield f"partial_rotary_factor {share}", _with_rope(fields, lambda kind: {**kind, "partial_rotary_factor": share})
    if isinstance(fields.get("rotary_dim"), int):
        yield "rotary_dim 8", {"rotary_dim": 8}
    if "llama_4_scaling_beta" in rope:
        settings = {"original_max_position_embeddings": THRESHOLD, "llama_4_scaling_beta": 0.5}
        yield f"llama_4_scaling_beta 0.5 from {THRESHOLD}", {"rope_parameters": {**rope, **settings}}


def _rotary_share(rope: Fields) -> float:
    """The smallest where kinds of layers differ: their lists cannot all be of the right length."""
    kinds = [kind for kind in rope.values() if isinstance(kind, dict)] or [rope]
    return min(float(kind.get("partial_rotary_factor", 1.0)) for kind in kinds)


def _derived_head_dim(fields: Fields) -> int:
    return int(fields.get("hidden_size", 64)) // int(fields.get("num_attention_heads", 4))


def _rope_types(head_dim: int) -> dict[str, Fields]:
    """A rope type, or a variant of one → its parameters."""
    original = {"original_max_position_embeddings": THRESHOLD}
    yarn = {"rope_type": "yarn", "factor": 8.0, **original}
    short, long = ([1.0 + step * index for index in range(head_dim // 2)] for step in (0.1, 0.4))
    known = {
        "linear": {"rope_type": "linear", "factor": 4.0},
        "dynamic": {"rope_type": "dynamic", "factor": 4.0, **original},
        "yarn": {**yarn, "mscale": 0.7, "mscale_all_dim": 0.4},
        "yarn, attention_factor": {**yarn, "attention_factor": 1.3, "truncate": False},
        "longrope": {
            "rope_type": "longrope",
            "short_factor": short,
            "long_factor": long,
            "original_max_position_embeddings": LONGROPE_ORIGINAL,
            # phimoe's own.
            "short_mscale": 1.1,
            "long_mscale": 1.2,
        },
        "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **original},
        "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
    }
    unknown = set(ROPE_INIT_FUNCTIONS) - {str(settings["rope_type"]) for settings in known.values()}
    return known | {kind: {"rope_type": kind, "factor": 4.0, **original} for kind in unknown}


def _with_rope(fields: Fields, change: Callable[[Fields], Fields]) -> Fields:
    """The rope parameters, of every kind of layer where they differ, with a change."""
    rope = fields["rope_parameters"]
    if any(isinstance(kind, dict) for kind in rope.values()):
        changed = {name: change(kind) if isinstance(kind, dict) else kind for name, kind in rope.items()}
    else:
        changed = change(rope)
    longrope = "longrope" in str(changed)
    if longrope and "original_max_position_embeddings" in fields:
        return {"rope_parameters": changed, "original_max_position_embeddings": LONGROPE_ORIGINAL}
    return {"rope_parameters": changed}


def _cycle(*kinds: str) -> list[str]:
    return [kinds[layer % len(kinds)] for layer in range(LAYERS)]


_KINDS = (_booleans, _scales, _switches, _heads, _windows, _layers, _thresholds, _ropes)
assert LONGROPE_ORIGINAL < POSITIONS
