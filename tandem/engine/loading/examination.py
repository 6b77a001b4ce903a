"""What a loaded model asks of attention, layer by layer, or in words why Tandem cannot serve it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, AttentionMaskInterface
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
from tandem.engine.loading import masks
from tandem.engine.loading.failures import refusing
from tandem.errors import ModelRefused

# Name of the attention that records; each layer hears its mask.
PROBE = "tandem_probe"
# Keyword arguments that do not change attention over the step's own metadata. The sliding window is a hint to other
# libraries: in transformers' own attention the mask alone hides keys.
_HARMLESS = {
    *("dropout", "position_ids", "cache_position", "is_causal", "use_cache", "layer_idx", "position_embeddings"),
    *("sliding_window", "logits_to_keep"),
}
_HONOURED = {"scaling", "softcap"}
# Layers of transformers' caches that keep nothing else; their subclasses keep more.
_KEYS_AND_VALUES = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer, DummyLayer)
_NOT_DECODER = "it is not a decoder-only language model"
_STATE = "layer {} keeps state that is not keys and values"


@dataclass(frozen=True)
class LayerShape:
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype


@dataclass
class AttentionProbe:
    """Records what each layer asks of attention, in a forward pass at load, in the order of calls; computes none."""

    options: dict[int, AttentionOptions] = field(default_factory=dict)
    shapes: dict[int, LayerShape] = field(default_factory=dict)
    # The module that called most recently.
    last: Any = None

    def run(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, asked: dict[str, Any]) -> Tensor:
        """Raises ModelRefused for what is not honoured."""
        layer = getattr(module, "layer_idx", None)
        if not isinstance(layer, int):
            raise ModelRefused(f"its {type(module).__name__} does not say which layer it is of (layer_idx)")
        if layer in self.options:
            raise ModelRefused(f"layer {layer} computes attention more than once")
        if not getattr(module, "is_causal", True):
            raise ModelRefused(f"layer {layer} is not causal: it is not a decoder-only language model")
        heard = masks.require_mask(mask, layer)
        if key.shape != value.shape:
            raise ModelRefused("its keys and values differ in shape")
        if key.shape[2] != query.shape[2]:
            raise ModelRefused(f"layer {layer} attends to {key.shape[2]} keys of {query.shape[2]} tokens")
        for name, value_asked in asked.items():
            if not (name in _HONOURED or name in _HARMLESS or value_asked is None or value_asked is False):
                raise ModelRefused(f"it needs the attention argument {name}, which Tandem does not honour")
        self.last = module
        self.options[layer] = options_asked(query, heard, asked)
        self.shapes[layer] = LayerShape(key.shape[1], key.shape[3], key.dtype)
        return query.transpose(1, 2)


def options_asked(query: Tensor, mask: masks.HeardMask, asked: dict[str, Any]) -> AttentionOptions:
    scale = asked.get("scaling")
    return AttentionOptions(
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
        window=mask.window,
        chunk=mask.chunk,
        softcap=float(asked.get("softcap") or 0.0),
    )


def probed_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """The contract of attention.paged_attention, under the other name."""
    probe = kwargs.pop("paged", None)
    if not isinstance(probe, AttentionProbe):
        raise ModelRefused(attention.NOT_PASSED_ON)
    return probe.run(module, query, key, value, attention_mask, kwargs), None


AttentionInterface.register(PROBE, probed_attention)
AttentionMaskInterface.register(PROBE, masks.hear)


@dataclass(frozen=True)
class Examined:
    # By layer index.
    options: dict[int, AttentionOptions]
    # The same for every layer.
    shape: LayerShape
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
    probe = AttentionProbe()
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
    model.set_attn_implementation(PROBE)
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


def _require_every_layer(model: Any, probe: AttentionProbe) -> None:
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
