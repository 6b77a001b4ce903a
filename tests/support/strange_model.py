"""A model that does what nobody can serve exactly, as its configuration says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import ARCHITECTURES
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

from tandem.config import parse_config
from tandem.engine.engine import Engine
from tandem.errors import ModelRefused

TINY = ARCHITECTURES["llama"]


class StrangeConfig(LlamaConfig):
    model_type = "strange"
    strangeness: str = ""
    stride: int = 1000
    token_stride: int = 0
    head_window: int = 0
    # What attention keeps of the stride, under a name of its own: so many times it, and so much more.
    times: int = 1
    more: int = 0
    # Taken from the logit of one token.
    banned: float = 0.0


def _positions(attention: Any, rows: int, told: Tensor | None, past: Any) -> Tensor:
    """Whose floor by the stride scales what goes into attention."""
    strangeness = attention.config.strangeness
    if strangeness == "rows":
        return torch.arange(rows) + (0 if past is None else past.get_seq_length(attention.layer_idx))
    assert told is not None
    return told.max().expand(rows) if strangeness == "longest" else told[0]


class StrangeAttention(LlamaAttention):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        positions = _positions(self, hidden_states.shape[1], kwargs.get("position_ids"), kwargs.get("past_key_values"))
        factor = 1 + torch.log1p((positions + 1) // (self.config.token_stride or self.config.head_window or self.reach))
        return super().forward(hidden_states * (1 - 2 * (factor[:, None] > 1)), *args, **kwargs)


class StrangeMLP(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        """As if the busiest tokens of a step left the others no room."""
        return super().forward(x) * (x.norm(dim=-1, keepdim=True) >= x.norm(dim=-1, keepdim=True).median())


class Strange(LlamaForCausalLM):
    config_class = StrangeConfig

    def __init__(self, config: StrangeConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            if config.strangeness in ("rows", "longest", "positions"):
                layer.self_attn.__class__ = StrangeAttention
                layer.self_attn.reach = config.times * config.stride + config.more
            if config.strangeness == "mixed":
                layer.mlp.__class__ = StrangeMLP

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.config.strangeness == "broken":
            raise KeyError("a part")
        if self.config.strangeness == "large":
            raise MemoryError
        output = super().forward(*args, **kwargs)
        output.logits[..., 5] -= self.config.banned
        return output


AutoConfig.register("strange", StrangeConfig)
AutoModelForCausalLM.register(StrangeConfig, Strange)


def save_model(folder: Path, architecture: str, **settings: Any) -> Path:
    """With random weights, all of which matter."""
    config = AutoConfig.for_model(architecture, **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "norm" not in name:
                parameter.normal_(0.0, 0.1)
    model.save_pretrained(folder)
    return folder


def save_strange(folder: Path, strangeness: str, **settings: Any) -> Path:
    """A tiny one; strangeness: which of its ways it has, see above."""
    return save_model(folder, "strange", **{**TINY, **settings}, strangeness=strangeness)


def refusal(folder: Path, **model: Any) -> str:
    """Why the engine does not serve it; model: more of that section of the configuration."""
    settings = {"model": {"path": str(folder), **model}, "engine": {"kv_memory_mib": 8}}
    with pytest.raises(ModelRefused) as caught:
        Engine(parse_config(settings), print)
    assert caught.value.field == "model.path"
    assert "\n" not in caught.value.message
    return caught.value.message
