"""What a loaded model asks of attention, layer by layer, or in words why Tandem cannot serve it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from tandem.engine import attention
from tandem.engine.batch import AttentionOptions
from tandem.engine.failures import refusing
from tandem.errors import ModelRefused

# Layers of transformers' caches that keep nothing else; their subclasses keep more.
_KEYS_AND_VALUES = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer, DummyLayer)
_NOT_DECODER = "it is not a decoder-only language model"
_STATE = "layer {} keeps state that is not keys and values"


@dataclass(frozen=True)
class Examined:
    # By layer index.
    options: dict[int, AttentionOptions]
    # The same for every layer.
    shape: attention.LayerShape
    # The attention module that a forward calls last.
    last_attention: nn.Module


def require_decoder_only(config: Any) -> None:
    """config: a model's, from transformers. Raises ModelRefused for a model of another kind, without building it."""
    if getattr(config, "is_encoder_decoder", False):
        raise ModelRefused(f"{_NOT_DECODER}: it is an encoder-decoder (is_encoder_decoder)")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        parts = " and ".join(name for name in config.sub_configs if name != "text_config")
        beside = f"; its configuration has {parts}" if parts else ""
        raise ModelRefused(f"{_NOT_DECODER}: transformers has no causal language model of its type{beside}")


def examine(model: Any) -> Examined:
    """One forward over a few tokens that records what every attention layer asks for. Raises ModelRefused."""
    probe = attention.Probe()
    try:
        with refusing("its forward pass with Tandem's attention"), _probed(model):
            ids = torch.arange(4, device=model.device).unsqueeze(0) % model.config.get_text_config().vocab_size
            positions = torch.arange(4, device=model.device).unsqueeze(0)
            model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=positions[0, -1:], paged=probe)
        _require_every_layer(model, probe)
    except ModelRefused:
        if (reason := _better_reason(model)) is not None:
            raise reason from None
        raise
    shapes = set(probe.shapes.values())
    if len(shapes) != 1:
        raise ModelRefused("its layers differ in the shape of their keys and values")
    return Examined(probe.options, shapes.pop(), probe.last)


@contextmanager
def _probed(model: Any) -> Iterator[None]:
    model.set_attn_implementation(attention.PROBE)
    try:
        with torch.inference_mode():
            yield
    finally:
        model.set_attn_implementation(attention.NAME)


@contextmanager
def as_transformers(model: Any) -> Iterator[None]:
    """Forwards inside are transformers' own, with the attention that it takes for the reference."""
    model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            yield
    finally:
        model.set_attn_implementation(attention.NAME)


def _require_every_layer(model: Any, probe: attention.Probe) -> None:
    if not model.config.get_text_config().num_hidden_layers:
        raise ModelRefused("its configuration gives it no layers (num_hidden_layers)")
    if not probe.options:
        raise ModelRefused("its attention does not go through AttentionInterface")
    layers = range(model.config.get_text_config().num_hidden_layers)
    missing = [layer for layer in layers if layer not in probe.options]
    if missing:
        raise ModelRefused(f"the attention of layer {missing[0]} does not go through AttentionInterface")
    if list(probe.options) != list(layers):
        raise ModelRefused("its attention layers are not numbered in their order")


def _better_reason(model: Any) -> ModelRefused | None:
    """What transformers' own forward says: that it fails too, or which layers compute something else than attention."""
    ids = torch.arange(4, device=model.device).unsqueeze(0) % model.config.get_text_config().vocab_size
    before = _tensors_on_modules(model)
    try:
        with refusing("transformers' own forward pass"), as_transformers(model):
            require_keys_and_values(model(input_ids=ids, use_cache=True))
    except ModelRefused as reason:
        return reason
    for name, tensor in _tensors_on_modules(model).items():
        layer = re.search(r"\.(\d+)\.", name)
        if layer and tensor is not before.get(name):
            return ModelRefused(_STATE.format(layer[1]))
    return None


def _tensors_on_modules(model: nn.Module) -> dict[str, Tensor]:
    """Other than parameters and buffers: what a forward leaves there is for the next one."""
    modules = model.named_modules()
    found = {f"{path}.{name}": value for path, module in modules for name, value in vars(module).items()}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def require_keys_and_values(output: Any) -> None:
    """Raises ModelRefused unless the cache of a forward's output holds keys and values alone, and forgets as its
    layers' masks hide.
    """
    cache = output.get("past_key_values")
    if not isinstance(cache, Cache):
        others = [name for name in output if "cache" in name or "state" in name.split("_") or "mems" in name]
        if cache is not None or others:
            raise ModelRefused(_STATE.format(0))
        return
    for index, layer in enumerate(getattr(cache, "layers", ())):
        if type(layer) not in _KEYS_AND_VALUES:
            raise ModelRefused(_STATE.format(index))
        # It keeps `[-window + 1:]` of its keys, which is all of them here, and makes a mask of width 1 for a new token.
        if getattr(layer, "sliding_window", None) == 1:
            raise ModelRefused(
                f"layer {index} has a window or chunk of 1 token, which transformers' cache does not honour: "
                "a prompt's token sees itself alone there, a generated one all before it"
            )
    # What a cache of the model's own class keeps beside its layers, one entry a layer.
    for beside in vars(cache).values():
        for index, held in enumerate(beside if isinstance(beside, list) else ()):
            if isinstance(held, Tensor):
                raise ModelRefused(_STATE.format(index))
