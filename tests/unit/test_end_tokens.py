"""Where answers end by themselves: every file that says so is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizer_zoo import edit
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config

from tandem.config import TINY_MODEL, ModelConfig
from tandem.engine.loading.end_tokens import end_token_ids


def ends(folder: Path, load_format: str = "auto") -> tuple[int, ...]:
    settings = ModelConfig(path=str(folder), load_format=load_format)  # type: ignore[arg-type]
    if load_format == "dummy":
        return end_token_ids(settings, AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)))
    return end_token_ids(settings, AutoModelForCausalLM.from_pretrained(folder))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The tiny model, of whose files none names an end."""
    found = tmp_path / "model"
    shutil.copytree(TINY_MODEL, found)
    edit(found / "config.json", lambda settings: settings.update(eos_token_id=None))
    edit(found / "tokenizer_config.json", lambda settings: settings.pop("eos_token"))
    (found / "generation_config.json").unlink()
    return found


def put(folder: Path, file: str, **settings: Any) -> None:
    edit(folder / file, lambda found: found.update(settings))


def test_no_file_names_one(folder: Path) -> None:
    assert ends(folder) == ()


@pytest.mark.parametrize(("eos", "wanted"), [(5, (5,)), ([5, 6], (5, 6)), ([5, 99999], (5,))])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_the_model_s_files(folder: Path, file: str, eos: Any, wanted: tuple[int, ...]) -> None:
    put(folder, file, eos_token_id=eos)
    assert ends(folder) == wanted


def test_generate_asks_its_own_file_first_and_the_tokenizer_s_end_is_one_in_any_case(folder: Path) -> None:
    put(folder, "config.json", eos_token_id=2)
    put(folder, "tokenizer_config.json", eos_token="<|user|>")
    assert ends(folder) == (2, 4)
    put(folder, "generation_config.json", eos_token_id=[7, 4])
    assert ends(folder) == (7, 4)
    put(folder, "generation_config.json", eos_token_id=None)
    assert ends(folder) == (4,)


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_the_tokenizer_s_end_where_transformers_4_kept_it(folder: Path, load_format: str) -> None:
    put(folder, "config.json", eos_token_id=2)
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|user|>"}}))
    assert ends(folder, load_format) == (2, 4)


def test_a_model_without_a_tokenizer(folder: Path) -> None:
    put(folder, "config.json", eos_token_id=2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert ends(folder) == (2,)


def test_a_configuration_inside_the_configuration(tmp_path: Path) -> None:
    """As models have it that see pictures too."""
    shape = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    text = {**shape, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32, "eos_token_id": [7, 9]}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    assert json.loads((tmp_path / "config.json").read_text()).get("eos_token_id") is None
    assert ends(tmp_path) == (7, 9)
