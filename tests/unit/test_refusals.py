"""Why a model is not served is told in words: the true reason, alone."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from strange_model import TINY, refusal, save_model, save_strange
from transformers import AutoConfig, AutoModelForCausalLM

from tandem.config import parse_config
from tandem.engine.loading.model_loader import load_model


def test_weights_that_are_no_numbers_are_the_reason(tmp_path: Path) -> None:
    save_model(tmp_path, "llama", **TINY)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 3] = float("nan")
    model.save_pretrained(tmp_path)
    assert "transformers' own logits are not numbers" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"num_hidden_layers": 0}, "no layers"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers"),
        ({"max_position_embeddings": None}, "max_position_embeddings"),
        (None, "it has no config.json"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused_by_name(
    settings: dict[str, Any] | None, reason: str, tmp_path: Path
) -> None:
    path = save_model(tmp_path, "llama", **TINY) / "config.json"
    if settings is None:
        path.unlink()
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    message = refusal(tmp_path)
    assert reason in message
    assert not message.endswith(":")


def test_a_model_that_raises_is_refused_in_words(tmp_path: Path) -> None:
    assert refusal(save_strange(tmp_path, "broken")).endswith(
        "transformers' own forward pass fails: KeyError: 'a part'"
    )


def test_out_of_memory_is_no_refusal(tmp_path: Path) -> None:
    with pytest.raises(MemoryError):
        load_model(parse_config({"model": {"path": str(save_strange(tmp_path, "large"))}}))


ENCODER_DECODER = "it is not a decoder-only language model: it is an encoder-decoder"
ANOTHER = "it is not a decoder-only language model: transformers has no causal language model of its type"


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("whisper", ENCODER_DECODER),
        ("bart", ENCODER_DECODER),
        ("t5", ENCODER_DECODER),
        ("clip", ANOTHER),
        ("llava", f"{ANOTHER}; its configuration has vision_config"),
    ],
)
def test_what_is_no_decoder_is_refused_for_that(architecture: str, reason: str, tmp_path: Path) -> None:
    """Before any weights are looked at: there are none."""
    AutoConfig.for_model(architecture).save_pretrained(tmp_path)
    assert reason in refusal(tmp_path)


def test_an_encoder_is_refused_for_that(tmp_path: Path) -> None:
    settings = {"is_decoder": False, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
    folder = save_model(tmp_path, "bert", **settings, num_hidden_layers=2, vocab_size=128)
    assert "layer 0 is not causal: it is not a decoder-only language model" in refusal(folder)


RECURRENT = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 128}
GPTJ = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "rotary_dim": 8, "vocab_size": 128}


@pytest.mark.parametrize(
    ("architecture", "settings", "reason"),
    [
        ("gptj", GPTJ, "its attention does not go through AttentionInterface"),
        ("falcon", RECURRENT | {"num_attention_heads": 4}, "its attention does not go through AttentionInterface"),
        ("lfm2", {**TINY, "layer_types": ["full_attention", "conv", "conv"]}, "layer 1 keeps state"),
        ("mamba", RECURRENT, "layer 0 keeps state that is not keys and values"),
        ("rwkv", RECURRENT, "layer 0 keeps state that is not keys and values"),
        ("recurrent_gemma", {**TINY, "lru_width": 64}, "layer 0 keeps state that is not keys and values"),
    ],
)
def test_the_true_reason_is_told_alone(
    architecture: str, settings: dict[str, Any], reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    folder = save_model(tmp_path, architecture, **{**settings, **special})
    caplog.clear()
    assert reason in refusal(folder)
    assert [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING] == []


def test_warnings_of_transformers_are_for_those_who_debug(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save_model(tmp_path, "gptj", **GPTJ, bos_token_id=1, eos_token_id=2)
    caplog.set_level("DEBUG", "tandem")
    refusal(folder)
    assert "does not support setting its attention implementation" in caplog.text
