"""Configuration: every mistake is named, with the nearest right key or the limit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tandem.config import TINY_MODEL, EngineConfig, ModelConfig, TandemConfig, load_config, parse_config
from tandem.errors import ConfigError


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "tandem.yaml"
    path.write_text(text)
    return path


def test_defaults_serve_the_tiny_model_on_loopback() -> None:
    config = load_config()
    assert config.model.path == str(TINY_MODEL)
    assert config.model.served_name == "tiny"
    assert (config.router.host, config.worker.host) == ("127.0.0.1", "127.0.0.1")
    assert (config.serve.prefill, config.serve.decode, config.serve.colocated) == (1, 1, 0)


def test_a_file_and_overrides_on_top(tmp_path: Path) -> None:
    path = written(tmp_path, "engine:\n  threads: 2\n  block_size: 32\nmodel:\n  name: m\n")
    config = load_config(path, {"engine": {"threads": 4, "device": None}, "router": {"port": None}})
    assert config.engine == EngineConfig(threads=4, block_size=32)
    assert config.model.served_name == "m"


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, "")) == TandemConfig()


def test_an_empty_section_takes_overrides(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, "engine:\n"), {"engine": {"threads": 2}}).engine.threads == 2


def test_a_section_that_is_none_is_named_with_overrides_too(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("engine: 5\n")
    with pytest.raises(ConfigError, match="engine"):
        load_config(path, {"engine": {"device": "cpu"}})


def test_json_is_yaml(tmp_path: Path) -> None:
    config = TandemConfig(model=ModelConfig(name="x"))
    assert load_config(written(tmp_path, config.model_dump_json())) == config


@pytest.mark.parametrize(
    ("settings", "key", "nearest"),
    [
        ({"engin": {}}, "engin", "engine"),
        ({"engine": {"blocksize": 16}}, "engine.blocksize", "engine.block_size"),
        ({"router": {"max_live_request": 1}}, "router.max_live_request", "router.max_live_requests"),
        ({"serve": {"colocate": 1}}, "serve.colocate", "serve.colocated"),
    ],
)
def test_an_unknown_key_gets_the_nearest_right_one(settings: dict[str, Any], key: str, nearest: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(settings)
    assert f"unknown config key {key}; did you mean {nearest}" in caught.value.message
    assert caught.value.field == key


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"engine": {"block_size": -1}}, ["engine.block_size", "greater than or equal to 0", "not -1"]),
        ({"router": {"port": 70000}}, ["router.port", "65535", "not 70000"]),
        ({"engine": {"device": "tpu"}}, ["engine.device", "'cpu'", "'cuda'", "not 'tpu'"]),
        ({"router": {"lease_s": 0}}, ["router.lease_s", "greater than 0"]),
        ({"serve": {"prefill": "many"}}, ["serve.prefill", "not 'many'"]),
        ({"engine": 3}, ["config key engine: must hold keys with values, not 3"]),
        ({"router": {"http_names": "a"}}, ["config key router.http_names: must be a list, not 'a'"]),
        ({"worker": {"nixl_devices": "eth0, lo"}}, ["config key worker.nixl_devices: names of", "not 'eth0, lo'"]),
        ({"worker": {"nixl_devices": ","}}, ["worker.nixl_devices", "not ','"]),
    ],
)
def test_a_bad_value_names_key_limit_and_value(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(settings)
    assert [word for word in words if word not in caught.value.message] == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("engine: [", "is not valid YAML"),
        ("- a\n- b\n", "must hold sections (model, engine, worker, router, serve)"),
        ("just words", "must hold sections"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, text: str, words: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert words in caught.value.message
    assert str(path) in caught.value.message


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read config file .*nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml")


def test_no_code_in_yaml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(written(tmp_path, "model: !!python/object/apply:os.getcwd []"))


def test_it_is_frozen() -> None:
    with pytest.raises(ValidationError):
        TandemConfig().engine.threads = 3  # type: ignore[misc]
