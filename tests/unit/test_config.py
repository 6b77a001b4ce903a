"""Configuration: every mistake is named, with the nearest right key or the limit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tandem.config import (
    TINY_MODEL,
    EngineConfig,
    ModelConfig,
    RouterConfig,
    TandemConfig,
    load_config,
    parse_config,
)
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


def test_the_working_directory_as_a_model_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "llama"
    model.mkdir()
    monkeypatch.chdir(model)
    assert parse_config({"model": {"path": "."}}).model.served_name == "llama"


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, "")) == TandemConfig()


def test_an_empty_section_sets_nothing(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, "engine:\nrouter:\n"))
    assert config == TandemConfig()
    assert config.router.model_fields_set == set()  # it was not said, for a cluster to fill in
    with pytest.raises(ConfigError, match="unknown config key engin; did you mean engine"):
        load_config(written(tmp_path, "engin:\n"))


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
        ({"router": {"lease_s": 0}}, ["router.lease_s", "greater than or equal to 0.1"]),
        ({"serve": {"prefill": "many"}}, ["serve.prefill", "not 'many'"]),
        ({"engine": 3}, ["config key engine: must hold keys with values, not 3"]),
        ({"router": {"http_names": "a"}}, ["config key router.http_names: must be a list, not 'a'"]),
        ({"worker": {"nixl_devices": "eth0, lo"}}, ["config key worker.nixl_devices: names of", "not 'eth0, lo'"]),
        ({"worker": {"nixl_devices": ","}}, ["worker.nixl_devices", "not ','"]),
        ({"engine": {"block_size": True}}, ["engine.block_size", "valid integer", "not True"]),
        ({"engine": {"block_size": "16"}}, ["engine.block_size", "valid integer", "not '16'"]),
        ({"engine": {"num_blocks": 1e3}}, ["engine.num_blocks", "valid integer", "not 1000.0"]),
        ({"router": {"lease_s": True}}, ["router.lease_s", "must be a number, not True"]),
        ({"model": {"path": ""}}, ["model.path: must be a directory or a hub id, and is empty"]),
        ({"model": {"path": " "}}, ["model.path: must be a directory or a hub id, and is empty"]),
        ({"model": {"max_model_len": 1 << 31}}, ["model.max_model_len", "less than 2147483648"]),
        ({"model": {"seed": 10**22}}, ["model.seed", "less than 18446744073709551616", f"not {10**22}"]),
        ({"engine": {"num_blocks": 10**20}}, ["engine.num_blocks", "16777216"]),
        ({"engine": {"kv_memory_mib": 10**20}}, ["engine.kv_memory_mib", "16777216"]),
        ({"engine": {"threads": 100_000}}, ["engine.threads", "1024", "not 100000"]),
        ({"engine": {"max_step_tokens": 10**20}}, ["engine.max_step_tokens", "1048576"]),
        ({"engine": {"max_running": 10**20}}, ["engine.max_running", "65536"]),
        ({"engine": {"max_waiting": 10**20}}, ["engine.max_waiting", "1048576"]),
        ({"worker": {"max_waiting_reservations": 10**20}}, ["worker.max_waiting_reservations", "1048576"]),
        ({"worker": {"drain_timeout_s": math.inf}}, ["worker.drain_timeout_s", "finite", "not inf"]),
        ({"router": {"lease_s": math.inf}}, ["router.lease_s", "finite", "not inf"]),
        ({"router": {"lease_s": math.nan}}, ["router.lease_s", "finite", "not nan"]),
        ({"router": {"lease_s": 1e-9}}, ["router.lease_s", "greater than or equal to 0.1", "not 1e-09"]),
        ({"router": {"lease_s": 1e9}}, ["router.lease_s", "less than or equal to 3600"]),
        ({"router": {"heartbeat_interval_s": math.inf}}, ["router.heartbeat_interval_s", "finite"]),
        ({"router": {"heartbeat_interval_s": 1e-9}}, ["router.heartbeat_interval_s", "0.01"]),
        ({"router": {"heartbeat_timeout_s": 1e9}}, ["router.heartbeat_timeout_s", "3600"]),
        ({"router": {"max_deadline_s": 1e12}}, ["router.max_deadline_s", "31536000"]),
        (
            {"router": {"heartbeat_interval_s": 5}},
            ["router.heartbeat_interval_s must be at most half of router.heartbeat_timeout_s (4), not 5"],
        ),
        (
            {"router": {"port": 8702, "http_port": 8702}},
            ["router.port (--port) and router.http_port (--http-port) must not be equal, and both are 8702"],
        ),
    ],
)
def test_a_bad_value_names_key_limit_and_value(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(settings)
    assert [word for word in words if word not in caught.value.message] == []


def test_what_was_good_stays_good() -> None:
    router = {"lease_s": 1, "max_deadline_s": "1e4", "heartbeat_interval_s": 0.05, "port": 0, "http_port": 0}
    config = parse_config({"router": router, "engine": {"block_size": 0, "threads": 0}, "model": {"seed": 2**64 - 1}})
    assert (config.router.lease_s, config.router.max_deadline_s) == (1.0, 1e4)
    assert RouterConfig(http_port=-1).http_port == -1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("engine: [", "is not valid YAML"),
        ("engine: " + "[" * 3000, "nested too deeply"),
        ("model: {seed: " + "9" * 5000 + "}", "is not valid YAML"),
        ("model: {name: 2001-99-99}", "is not valid YAML"),
        ("false", "must hold sections"),
        ("- a\n- b\n", "must hold sections (model, engine, worker, router, serve, log)"),
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
