"""A share of the zoo (`make zoo` tries all): every kind of attention, exact against transformers or refused by name."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
from zoo_configs import text_fields, tiny
from zoo_features import features
from zoo_result import Outcome
from zoo_trial import Verdict, tried

from tandem.engine.loading import examination

# Architecture, feature: what it covers is the feature's name, and the architecture's own.
EXACT = [
    ("llama", "MHA"),
    ("llama", "MQA"),
    ("llama", "odd sizes"),
    ("llama", "head_dim 24"),
    ("llama", "tie_word_embeddings=True"),
    ("llama", "rope linear"),
    ("llama", "rope yarn"),
    ("llama", "rope llama3"),
    ("llama", "rope longrope"),
    ("llama", "rope proportional"),
    ("llama", "rope dynamic"),
    ("qwen2", "sliding_window 27"),  # in half of the layers, with biases
    ("mistral", "sliding_window 27"),
    ("gemma2", "attn_logit_softcapping 1.5"),
    ("gemma3_text", "sliding_window 27"),  # norms of queries and keys, two ropes
    ("gemma4_text", "as it is"),
    ("glm4", "as it is"),  # partial rotary, interleaved
    ("phi", "as it is"),  # parallel residual, layer norms, biases
    ("gpt_neox", "use_parallel_residual=False"),
    ("gpt2", "scale_attn_by_inverse_layer_idx=True"),  # learned positions, a scale of each layer's own
    ("cohere2", "sliding_window 27"),  # norms without biases, layers without positions
    ("granite", "attention_multiplier"),
    ("olmo2", "3 heads"),
    ("smollm3", "no_rope_layers: 2 of 4"),
    ("dbrx", "as it is"),  # clipped queries, keys and values; experts
    ("qwen3_moe", "mlp_only_layers"),
    ("ernie4_5_moe", "as it is"),  # shared experts
]
REFUSED = [
    ("gpt_oss", "as it is", "s_aux"),
    ("deepseek_v3", "as it is", "its keys and values differ in shape"),
    ("gemma2", "use_bidirectional_attention", "not causal"),
]


def verdict(architecture: str, feature: str, folder: Path) -> Verdict:
    changes = dict(features(text_fields(tiny(architecture))))
    return tried(architecture, changes[feature], folder)


@pytest.mark.parametrize(("architecture", "feature"), EXACT)
def test_served_as_transformers_generates(architecture: str, feature: str, tmp_path: Path) -> None:
    assert verdict(architecture, feature, tmp_path) == Verdict(Outcome.EXACT)


@pytest.mark.parametrize(("architecture", "feature", "reason"), REFUSED)
def test_refused_by_name(architecture: str, feature: str, reason: str, tmp_path: Path) -> None:
    told = verdict(architecture, feature, tmp_path)
    assert told.outcome is Outcome.REFUSED
    assert reason in told.words


def test_another_computation_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The zoo can fail: a softcap that is forgotten, and not noticed when the model is loaded."""
    options = examination.options_asked
    monkeypatch.setattr(examination, "options_asked", lambda *given: replace(options(*given), softcap=0.0))
    monkeypatch.setattr("tandem.engine.engine.require_exactness", lambda *arguments: logging.info("not checked"))
    assert verdict("gemma2", "attn_logit_softcapping 1.5", tmp_path).outcome is Outcome.WRONG
