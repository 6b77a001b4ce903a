"""A model's small files that are broken: worker and router name the file and what is wrong with it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tandem.config import TINY_MODEL, ModelConfig, parse_config
from tandem.engine.loading.model_loader import load_model
from tandem.errors import ModelRefused
from tandem.tokenizer import load_tokenizer


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def of_another_kind(path: Path) -> None:
    path.write_bytes(b"\x1f\x8b\x08\x00")


def a_list(path: Path) -> None:
    path.write_text("[]")


def nothing(path: Path) -> None:
    path.write_text("")


def gone(path: Path) -> None:
    """A link into a cache that was cleared."""
    path.unlink(missing_ok=True)
    path.symlink_to("blobs/0123")


SMALL = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
FAULTS: list[tuple[str, Callable[[Path], None], str]] = [
    *((name, cut, "is not JSON: ") for name in SMALL),
    *((name, of_another_kind, "is not UTF-8 text: ") for name in (*SMALL, "chat_template.jinja")),
    *((name, a_list, "is not a JSON object") for name in SMALL),
    *((name, nothing, "is empty") for name in SMALL),
    ("generation_config.json", gone, "cannot be read: No such file or directory"),
    ("tokenizer.json", cut, "cannot be read: EOF while parsing"),
    ("tokenizer.json", of_another_kind, "cannot be read: "),
    ("tokenizer.json", a_list, "cannot be read: "),
    ("tokenizer.json", nothing, "cannot be read: EOF while parsing"),
    ("tokenizer.json", gone, "cannot be read: No such file"),
]


@pytest.mark.parametrize(("name", "broken", "fault"), FAULTS)
def test_router_and_worker_name_the_file_and_its_fault(
    name: str, broken: Callable[[Path], None], fault: str, tmp_path: Path
) -> None:
    shutil.copytree(TINY_MODEL, tmp_path, dirs_exist_ok=True)
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "<unk>"}')
    broken(tmp_path / name)
    loads: list[Callable[[], Any]] = [
        lambda: load_model(parse_config({"model": {"path": str(tmp_path)}})),
        lambda: load_tokenizer(ModelConfig(path=str(tmp_path))),
    ]
    for load in loads:
        with pytest.raises(ModelRefused) as caught:
            load()
        assert f"its {name} {fault}" in caught.value.message
        assert "\n" not in caught.value.message
        assert caught.value.field == "model.path"


def test_an_index_of_weights_is_read_where_there_is_no_single_file(tmp_path: Path) -> None:
    shutil.copytree(TINY_MODEL, tmp_path, dirs_exist_ok=True)
    nothing(tmp_path / "model.safetensors.index.json")
    config = parse_config({"model": {"path": str(tmp_path)}})
    load_model(config)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelRefused, match=r"its model\.safetensors\.index\.json is empty"):
        load_model(config)
