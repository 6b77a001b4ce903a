"""The engine on tiny models: same tokens, nothing leaked, clear refusals."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_driver import EngineDriver
from model_zoo import ARCHITECTURES, save_model
from transformers import AutoConfig, AutoModelForCausalLM

from tandem.config import EngineConfig, parse_config
from tandem.engine.engine import Engine
from tandem.engine.loading.kv_sizing import count_blocks
from tandem.engine.loading.model_loader import load_model
from tandem.engine.sequence import Emission, KVWritten, Started
from tandem.errors import ConfigError, InvalidRequest, ModelRefused
from tandem.types import Fingerprint, FinishReason, SamplingParams

PROMPTS = [[5, 6, 7], list(range(3, 60)), [9] * 20]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama"))


def _refusal(path: Path, **settings: Any) -> str:
    with pytest.raises(ModelRefused) as caught:
        Engine(parse_config({"model": {"path": str(path)}, "engine": {"kv_memory_mib": 4}, **settings}), print)
    return caught.value.message


def test_batch_chunks_and_prefix_cache_do_not_change_tokens(llama: Path) -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    alone = [EngineDriver(llama).generate([prompt], params)[0] for prompt in PROMPTS]
    chunked = EngineDriver(llama, max_step_tokens=5)
    assert chunked.generate(PROMPTS, params) == alone
    assert chunked.generate(PROMPTS, params) == alone
    assert chunked.engine.load.prefix_hit_tokens > 0
    assert EngineDriver(llama, prefix_cache=False).generate(PROMPTS, params) == alone


def test_seeded_sampling_is_the_same_alone_and_in_a_batch(llama: Path) -> None:
    params = [
        SamplingParams(max_tokens=10, temperature=1.0, top_p=0.95, seed=seed, ignore_eos=True) for seed in range(16)
    ]
    driver = EngineDriver(llama)
    together = driver.generate([PROMPTS[1]] * 16, params)
    alone = [driver.generate([PROMPTS[1]], each)[0] for each in params]
    assert together == alone
    assert len({tuple(tokens) for tokens in together}) > 8


def test_events_come_in_order(llama: Path) -> None:
    driver = EngineDriver(llama, max_step_tokens=32)
    driver.generate([PROMPTS[1]], SamplingParams(max_tokens=2, ignore_eos=True))
    events = [event for _, event in driver.emissions]
    assert isinstance(events[0], Started)
    layers = range(driver.engine.fingerprint.num_layers)
    written = [event for event in events if isinstance(event, KVWritten)]
    assert written == [KVWritten(layers, 0, 32), KVWritten(layers, 32, 57)]
    assert [type(event).__name__ for event in events[-2:]] == ["NewToken", "NewToken"]


class LayerWatch(EngineDriver):
    """Notes of each telling of KV: what was told, and which layers of the sequence's first block were there then."""

    def _publish(self, emissions: list[Emission]) -> None:
        super()._publish(emissions)
        for sequence, event in emissions:
            if isinstance(event, KVWritten) and sequence.table is not None:
                block = self.engine.cache.pool[:, :, sequence.table.blocks[0]]
                self.notes.append((event, [bool(layer.any()) for layer in block]))

    notes: list[tuple[KVWritten, list[bool]]]


def test_a_layer_is_told_before_the_next_is_computed(llama: Path) -> None:
    driver = LayerWatch(llama, frame_bytes=4096)
    driver.notes = []
    driver.generate([PROMPTS[1]], SamplingParams(max_tokens=1, ignore_eos=True))
    layers = driver.engine.fingerprint.num_layers
    assert driver.notes == [
        (KVWritten(range(layer, layer + 1), 0, 57), [other <= layer for other in range(layers)])
        for layer in range(layers)
    ]


def test_eos_stop_ids_and_length_end_a_request(llama: Path) -> None:
    driver = EngineDriver(llama)
    free = driver.generate([PROMPTS[0]], SamplingParams(max_tokens=8, ignore_eos=True))[0]
    stopped = driver.add("stop", PROMPTS[0], SamplingParams(max_tokens=8, ignore_eos=True, stop_token_ids=(free[2],)))
    long = driver.add("length", PROMPTS[0], SamplingParams(max_tokens=3, ignore_eos=True))
    driver.run()
    assert stopped.finish_reason is FinishReason.STOP
    assert stopped.output_ids == free[: free.index(free[2]) + 1]
    assert long.finish_reason is FinishReason.LENGTH
    assert long.output_ids == free[:3]


def test_abort_in_every_state_frees_everything(llama: Path) -> None:
    driver = EngineDriver(llama, max_step_tokens=8)
    survivor = driver.add("survivor", PROMPTS[0], SamplingParams(max_tokens=30, ignore_eos=True))
    waiting = driver.add("waiting", PROMPTS[1], SamplingParams(max_tokens=5))
    driver.engine.abort(waiting)
    prefilling = driver.add("prefilling", [7] * 57, SamplingParams(max_tokens=5))
    driver.engine.step()
    driver.engine.step()
    assert 0 < prefilling.num_computed < 57
    driver.engine.abort(prefilling)
    decoding = driver.add("decoding", [8] * 4, SamplingParams(max_tokens=40, ignore_eos=True))
    while len(decoding.output_ids) < 3:
        driver.engine.step()
    driver.engine.abort(decoding)
    driver.engine.abort(decoding)
    driver.run()
    assert survivor.finish_reason is FinishReason.LENGTH
    assert driver.engine.num_live == 0
    assert driver.engine.pool.check_integrity().referenced == 0


def test_an_end_of_sequence_outside_of_the_vocabulary_is_none(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps({**settings, "eos_token_id": [2, 50256]}))
    driver = EngineDriver(tmp_path)
    assert driver.engine.info.eos_token_ids == (2,)
    assert len(driver.generate([PROMPTS[0]], SamplingParams(max_tokens=4, min_tokens=4))[0]) == 4


def test_a_failing_step_ends_its_sequences_and_not_the_engine(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = EngineDriver(llama)
    with monkeypatch.context() as broken:
        broken.setattr(driver.engine._runner, "run", lambda plan: 1 / 0)
        driver.add("unlucky", PROMPTS[0], SamplingParams(max_tokens=4))
        driver.run()
    assert "unlucky" in driver.failures
    assert "division" not in str(driver.failures["unlucky"]), "no internals in error messages"
    assert driver.engine.pool.check_integrity().referenced == 0
    driver.failures.clear()
    assert len(driver.generate([PROMPTS[0]], SamplingParams(max_tokens=4, ignore_eos=True))[0]) == 4


@pytest.mark.parametrize(
    ("prompt", "params", "complaint"),
    [
        ([], SamplingParams(), "empty"),
        ([128], SamplingParams(), "128"),
        ([5], SamplingParams(logit_bias={500: 1.0}), "500"),
        ([5] * 500, SamplingParams(max_tokens=13), "512"),
    ],
)
def test_bad_requests_are_refused(llama: Path, prompt: list[int], params: SamplingParams, complaint: str) -> None:
    with pytest.raises(InvalidRequest, match=complaint):
        EngineDriver(llama).add("bad", prompt, params)


def test_a_request_larger_than_the_pool_is_refused(llama: Path) -> None:
    driver = EngineDriver(llama, num_blocks=4)
    with pytest.raises(InvalidRequest, match="the pool holds 64"):
        driver.add("large", [5] * 60, SamplingParams(max_tokens=6))
    assert driver.engine.pool.num_free == 4


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    assert str(tmp_path) in _refusal(tmp_path)


def test_a_missing_directory_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.path: there is no such directory: .*nowhere"):
        parse_config({"model": {"path": str(tmp_path / "nowhere")}})


def test_more_tokens_than_the_model_takes_are_refused(llama: Path) -> None:
    def longest(tokens: int) -> int:
        return load_model(parse_config({"model": {"path": str(llama), "max_model_len": tokens}})).info.max_model_len

    assert (longest(0), longest(512), longest(100)) == (512, 512, 100)
    with pytest.raises(ConfigError, match=r"^model\.max_model_len must be at most 512, .*, not 99999999") as caught:
        longest(99_999_999)
    assert caught.value.field == "model.max_model_len"


def test_a_model_that_does_its_own_attention_is_refused(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "mamba",
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=4,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    message = _refusal(tmp_path)
    assert "mamba" in message
    assert "\n" not in message


def test_attention_arguments_that_are_not_honoured_are_refused(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "gpt_oss",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        pad_token_id=0,
        eos_token_id=1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert "s_aux" in _refusal(tmp_path)


def test_a_pool_without_room_for_a_block_is_refused() -> None:
    large = Fingerprint("", "", "float32", block_size=256, num_layers=80, num_kv_heads=8, head_dim=128, layout=1)
    with pytest.raises(ConfigError, match=r"^engine\.kv_memory_mib must be 160 or more, not 159: "):
        count_blocks(EngineConfig(kv_memory_mib=159), large, 25)
    assert count_blocks(EngineConfig(kv_memory_mib=160), large, 25) == 1


def test_a_pool_in_which_a_model_cannot_be_checked_is_refused(llama: Path) -> None:
    with pytest.raises(ConfigError, match=r"^engine\.num_blocks must be 2 or more, not 1: ") as caught:
        EngineDriver(llama, num_blocks=1)
    assert caught.value.field == "engine.num_blocks"


def test_a_pool_that_is_smaller_than_the_longest_request_is_said_so(
    llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    EngineDriver(llama, num_blocks=2).generate([[5] * 20], SamplingParams(max_tokens=4))
    assert "the KV pool holds 32 tokens: longer requests are refused, though the model takes 512" in caplog.text
    assert "engine.num_blocks must be 32 or more" in caplog.text
    caplog.clear()
    EngineDriver(llama, num_blocks=32)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_fingerprints_tell_models_apart(llama: Path, tmp_path: Path) -> None:
    other = save_model("llama", tmp_path / "other", seed=1)

    def fingerprint(path: Path, **engine: Any) -> Any:
        return load_model(parse_config({"model": {"path": str(path)}, "engine": engine})).info.fingerprint

    same = fingerprint(llama)
    assert same.difference(fingerprint(llama)) is None
    assert "weights_hash" in (same.difference(fingerprint(other)) or "")
    assert same.difference(fingerprint(llama, block_size=32)) == "block_size 16 against 32"


def test_dummy_weights_need_a_config_only_and_follow_the_seed(tmp_path: Path) -> None:
    AutoConfig.for_model("llama", **ARCHITECTURES["llama"]).save_pretrained(tmp_path)

    def weights(seed: int) -> torch.Tensor:
        model = {"path": str(tmp_path), "load_format": "dummy", "seed": seed}
        return next(load_model(parse_config({"model": model})).model.parameters())

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_half_precision_runs(llama: Path) -> None:
    config = parse_config({"model": {"path": str(llama), "dtype": "bfloat16"}, "engine": {"kv_memory_mib": 4}})
    assert Engine(config, print).info.fingerprint.dtype == "bfloat16"
