"""A model is served exactly as transformers does it, or refused for its true reason (law 9)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_driver import EngineDriver
from strange_model import TINY, refusal, save_model, save_strange
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_causal_mask,
    create_chunked_causal_mask,
    create_sliding_window_causal_mask,
)
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention

from tandem.config import parse_config
from tandem.engine.attention import NAME, PagedStep
from tandem.engine.backends.cpu.kernels.tile import registers_suffice
from tandem.engine.backends.cpu.layer import FusedLayer
from tandem.engine.batch import AttentionOptions
from tandem.engine.engine import Engine
from tandem.engine.loading.examination import PROBE
from tandem.engine.loading.model_loader import load_model
from tandem.errors import ConfigError
from tandem.types import SamplingParams

MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
OUTPUT = 8


def require_exact(folder: Path, lengths: tuple[int, ...] = (1, 7, 33, 90)) -> EngineDriver:
    """Prompts in one batch, in chunks, computed and from the prefix cache."""
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, 128, (length,), generator=generator).tolist() for length in lengths]
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    wanted = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=OUTPUT, do_sample=False)
        wanted.append(out[0, len(prompt) :].tolist())
    driver = EngineDriver(folder, max_step_tokens=24)
    for _ in ("computed", "prefix hit"):
        assert driver.generate(prompts, SamplingParams(max_tokens=OUTPUT)) == wanted
    return driver


@pytest.mark.skipif(not registers_suffice(), reason="the tiles are cut for AVX-512")
def test_a_short_cut_that_is_wrong_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A fused layer that passed its trial, and is wrong in a step of several sequences."""
    folder = save_model(tmp_path, "llama", **TINY)
    run, wrong = FusedLayer._run, []

    def planted(self: FusedLayer, x: Tensor, cos: Tensor, sin: Tensor, step: PagedStep) -> Tensor:
        out = run(self, x, cos, sin, step)
        if len(step.batch.context_lens) == 1:
            return out
        wrong.append(step)
        return out.roll(1, dims=-1)

    monkeypatch.setattr(FusedLayer, "_run", planted)
    require_exact(folder)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "without cutting the last layer" in warning
    assert "and the engine's own decoder layers" in warning
    assert "its paged logits differ from transformers'" in warning
    assert len(wrong) == 2 * TINY["num_hidden_layers"], "in the check at load, and never again"


def options_of(folder: Path) -> list[AttentionOptions]:
    return list(load_model(parse_config({"model": {"path": str(folder)}})).options.values())


# The mask of the first slides, and its attention is told nothing of it; the second's attention is told alone.
@pytest.mark.parametrize(
    ("architecture", "settings", "masks"),
    [
        ("phimoe", {**MOE, "sliding_window": 20}, [(20, 0)]),
        ("llama4_text", {**MOE, "attention_chunk_size": 20, "intermediate_size_mlp": 128}, [(0, 20), (0, 0)]),
        ("cohere2", {"sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"] * 2}, [(20, 0)]),
        ("ministral3", {"sliding_window": None}, [(0, 0)]),
    ],
)
def test_masks_are_heard_and_honoured(
    architecture: str, settings: dict[str, Any], masks: list[tuple[int, int]], tmp_path: Path
) -> None:
    folder = save_model(tmp_path, architecture, **{**TINY, "num_hidden_layers": 4, **settings})
    assert {(options.window, options.chunk) for options in options_of(folder)} >= set(masks)
    require_exact(folder)


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [("mistral", {"sliding_window": 1}), ("llama4_text", {**MOE, "attention_chunk_size": 1, "num_hidden_layers": 4})],
)
def test_a_window_of_one_token_is_refused_for_what_transformers_makes_of_it(
    architecture: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    folder = save_model(tmp_path, architecture, **{**TINY, **settings, "intermediate_size_mlp": 128})
    assert "layer 0 has a window or chunk of 1 token, which transformers' cache does not honour" in refusal(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    prompt = torch.tensor([[5, 6, 7, 8]])
    changed = prompt.clone()
    changed[0, 1] = 9
    seen = []
    for ids in (prompt, changed):
        first = model(input_ids=ids, use_cache=True)
        second = model(input_ids=torch.tensor([[10]]), past_key_values=first.past_key_values, use_cache=True)
        seen.append((first.logits[0, -1], second.logits[0, -1]))
    (first, second), (first_changed, second_changed) = seen
    assert not torch.equal(second, second_changed), "a generated token sees the prompt"
    if architecture == "mistral":  # the other's layers of full attention see it
        assert torch.equal(first, first_changed), "a prompt's token sees itself alone"


def test_a_cache_that_forgets_what_the_mask_shows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own cache keeps a window of keys, by the configuration; the mask knows none."""
    folder = save_model(tmp_path, "mistral", **{**TINY, "sliding_window": 20})
    monkeypatch.setattr(
        "transformers.models.mistral.modeling_mistral.create_sliding_window_causal_mask", create_causal_mask
    )
    assert {options.window for options in options_of(folder)} == {0}
    assert "sliding_window = 20" in refusal(folder)


def test_the_mask_decides_where_a_keyword_says_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model(tmp_path, "llama", **TINY)
    forward = LlamaAttention.forward
    monkeypatch.setattr(LlamaAttention, "forward", partialmethod(forward, sliding_window=8))
    require_exact(folder)


def _every_second(_batch: Any, _head: Any, query: Any, key: Any) -> Any:
    return (query - key) % 2 == 0


def _own_tensor(inputs_embeds: Tensor, **_: Any) -> Tensor:
    rows = inputs_embeds.shape[1]
    return torch.full((1, 1, rows, rows), -1e9).triu(1)


def _computed_with(**given: Any) -> Any:
    return create_causal_mask(**given)[:, :, :, :]


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (partial(create_causal_mask, and_mask_function=_every_second), "does not know: _every_second"),
        (partial(create_causal_mask, or_mask_function=_every_second), "does not know: or_masks"),
        (partial(create_causal_mask, block_sequence_ids=torch.zeros(1, 64, dtype=torch.long)), "or_masks"),
        (
            lambda config, inputs_embeds, attention_mask, **_: create_bidirectional_mask(
                config, inputs_embeds, attention_mask
            ),
            "layer 0 wants bidirectional attention",
        ),
        (lambda **_: None, "layer 0 wants bidirectional attention"),
        (_own_tensor, "a mask that is not made through transformers' AttentionMaskInterface"),
        (_computed_with, "it computes with the attention masks"),
    ],
    ids=["and", "or", "blocks", "bidirectional", "none", "tensor", "computed"],
)
def test_other_masks_are_refused_by_name(
    mask: Callable[..., Any], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(tmp_path, "llama", **TINY)
    monkeypatch.setattr(modeling_llama, "create_causal_mask", mask)
    assert reason in refusal(folder)


def test_windows_and_chunks_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model(tmp_path, "llama", **TINY, attention_chunk_size=30, sliding_window=20)

    def both(config: Any, **given: Any) -> Any:
        slides = create_sliding_window_causal_mask(config=config, **given)
        if config._attn_implementation == PROBE:
            return slides.joined(create_chunked_causal_mask(config=config, **given))
        if config._attn_implementation == NAME:
            return None
        return torch.minimum(slides, create_chunked_causal_mask(config=config, **given))

    monkeypatch.setattr(modeling_llama, "create_causal_mask", both)
    assert {(options.window, options.chunk) for options in options_of(folder)} == {(20, 30)}
    require_exact(folder)


def test_positions_from_rows_are_refused_though_they_matter_late(tmp_path: Path) -> None:
    message = refusal(save_strange(tmp_path, "rows", stride=400))
    assert "stride = 400" in message
    assert "positions from the rows of a step" in message
    assert "model.max_model_len: 399 keeps every sequence below" in message
    limited = {"model": {"path": str(tmp_path), "max_model_len": 399}, "engine": {"kv_memory_mib": 8}}
    assert Engine(parse_config(limited), print).info.max_model_len == 399


def test_positions_from_rows_that_never_matter_are_served(tmp_path: Path) -> None:
    require_exact(save_strange(tmp_path, "rows", stride=100_000))


def test_dynamic_rope_is_served_up_to_the_length_where_it_is_exact(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The longest prompt and its answer fill it, beside shorter ones."""
    caplog.set_level("INFO")
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    folder = save_model(tmp_path, "llama", **{**TINY, "max_position_embeddings": 90 + OUTPUT, "rope_parameters": rope})
    driver = require_exact(folder)
    assert driver.engine.info.max_model_len == 90 + OUTPUT
    assert caplog.text.count("takes 98 tokens, up to which its rope type 'dynamic' is exact") == 1
    longer = {"model": {"path": str(folder), "max_model_len": 90 + OUTPUT + 1}}
    with pytest.raises(ConfigError, match=r"model\.max_model_len must be at most 98"):
        load_model(parse_config(longer))


def test_llama4_is_refused_where_its_scale_takes_positions_from_rows(tmp_path: Path) -> None:
    settings = {**TINY, **MOE, "num_hidden_layers": 4, "intermediate_size_mlp": 128, "attention_chunk_size": 64}
    assert "floor_scale = 100" in refusal(save_model(tmp_path, "llama4_text", **settings, floor_scale=100))


def test_scales_by_position_are_served_without_the_fused_layer(tmp_path: Path) -> None:
    """The fused layer knows nothing of positions; 400 is beyond what a short prompt reaches, 20 is not."""
    for stride in (20, 400):
        require_exact(save_strange(tmp_path / str(stride), "positions", stride=stride))
    beta = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "llama_4_scaling_beta": 0.5}
    settings = {**TINY, "rope_parameters": {**beta, "rope_theta": 1e4}, "sliding_window": None}
    require_exact(save_model(tmp_path / "ministral3", "ministral3", **settings))


@pytest.mark.parametrize("strangeness", ["longest", "mixed"])
def test_what_a_token_owes_to_other_sequences_is_refused(strangeness: str, tmp_path: Path) -> None:
    """A switch by the longest position of a step, far beyond what a prompt at load reaches; capacity of a step."""
    assert "differ from transformers'" in refusal(save_strange(tmp_path, strangeness, stride=300))


@pytest.mark.parametrize("banned", [1e5, 3e38, float("inf")])
def test_a_banned_token_hides_nothing_and_is_no_reason(banned: float, tmp_path: Path) -> None:
    assert "differ from transformers'" in refusal(save_strange(tmp_path / "mixed", "mixed", banned=banned))
    require_exact(save_strange(tmp_path / "right", "", banned=banned))


def test_lengths_are_known_by_more_than_their_names(tmp_path: Path) -> None:
    """A word that others have for something else."""
    assert "token_stride = 400" in refusal(save_strange(tmp_path / "stride", "rows", token_stride=400))
    assert "head_window = 400" in refusal(save_strange(tmp_path / "window", "rows", head_window=400))


@pytest.mark.parametrize(("times", "more"), [(1, 0), (2, 0), (1, -1), (3, 1)])
def test_what_a_module_makes_of_a_length_is_crossed_though_it_equals_another_size(
    times: int, more: int, tmp_path: Path
) -> None:
    stride = TINY["hidden_size"]
    assert f"stride = {stride}" in refusal(save_strange(tmp_path, "rows", stride=stride, times=times, more=more))


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("mistral", {"sliding_window": 64}),
        (
            "ministral3",
            {
                "sliding_window": None,
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 64,
                    "llama_4_scaling_beta": 0.5,
                    "rope_theta": 1e4,
                },
            },
        ),
    ],
)
def test_lengths_that_equal_the_hidden_size_are_served(
    architecture: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    require_exact(save_model(tmp_path, architecture, **{**TINY, **settings}))
