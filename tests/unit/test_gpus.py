"""Which GPU each worker gets; no GPU is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import one_line, tandem

from tandem.config import EngineConfig, parse_config
from tandem.engine.backends.cuda import gpus
from tandem.engine.backends.cuda.gpus import VARIABLE, count_gpus, share_gpus, take_gpu
from tandem.errors import ConfigError
from tandem.launch.pools import check_pools
from tandem.launch.worker import worker_kind
from tandem.types import Role
from tandem.worker.main import run_worker


def engine(**settings: Any) -> EngineConfig:
    return parse_config({"engine": {"device": "cuda", **settings}}).engine


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(gpus, "count_gpus", lambda: 2)


@pytest.mark.parametrize(
    ("visible", "settings", "workers", "wanted"),
    [
        (None, {}, 2, ["0", "1"]),
        ("5,GPU-abc", {}, 2, ["5", "GPU-abc"]),
        (None, {"devices": [1, 0]}, 2, ["1", "0"]),
        (None, {"devices": [7, 3, 2]}, 2, ["7", "3"]),
        # Counted among those that are there for us.
        ("5,6", {"devices": [1, 0]}, 2, ["6", "5"]),
        ("5,6", {"devices": ["GPU-0a1b", "MIG-GPU-1/2/0"]}, 2, ["GPU-0a1b", "MIG-GPU-1/2/0"]),
        (None, {"devices": [0, 0], "kv_memory_mib": 64}, 2, ["0", "0"]),
        (None, {"devices": [0, 1, 0], "num_blocks": 9}, 3, ["0", "1", "0"]),
    ],
)
def test_each_worker_gets_its_own(
    visible: str | None, settings: dict[str, Any], workers: int, wanted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is not None:
        monkeypatch.setenv(VARIABLE, visible)
    assert share_gpus(engine(**settings), workers) == wanted


def test_none_on_cpu() -> None:
    assert share_gpus(EngineConfig(), 9) == []


@pytest.mark.parametrize(
    ("visible", "settings", "workers", "words"),
    [
        (None, {}, 3, "3 workers need a GPU each, and this machine shows 2: start fewer"),
        ("4,5", {}, 3, r"shows 2 \(CUDA_VISIBLE_DEVICES=4,5\)"),
        (None, {"devices": [0]}, 2, "for each of 2 workers, and names 1"),
        (None, {"devices": [0, 0]}, 2, "share a GPU .* engine.kv_memory_mib or engine.num_blocks"),
        (
            "4",
            {"devices": [0, 1]},
            2,
            r"names GPU 1, .* and this process sees 1 \(CUDA_VISIBLE_DEVICES=4\)",
        ),
    ],
)
def test_too_few(
    visible: str | None, settings: dict[str, Any], workers: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is not None:
        monkeypatch.setenv(VARIABLE, visible)
    with pytest.raises(ConfigError, match=words):
        share_gpus(engine(**settings), workers)


def test_services_that_are_compared_share_gpus(tmp_path: Path) -> None:
    goodput = ("--input-len", "8", "--output-len", "8", "--goodput", "ttft:1000")
    result = tandem("bench", "compare", "--device", "cuda", *goodput)
    assert result.exit_code == 2
    assert "share the GPUs" in one_line(result)
    said = tmp_path / "tandem.yaml"
    said.write_text("engine: {kv_memory_mib: 64}")
    # The next thing that is wrong.
    more = tandem("bench", "compare", "--device", "cuda", "--workers", "10000", "--config", str(said), *goodput)
    assert "--workers" in one_line(more)


def test_a_worker_that_is_started_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "4,5")
    take_gpu(engine())
    assert gpus.os.environ[VARIABLE] == "4,5"
    take_gpu(engine(devices=[1]))
    assert gpus.os.environ[VARIABLE] == "5"
    with pytest.raises(ConfigError, match="one GPU for one worker, and names 2"):
        take_gpu(engine(devices=[0, 1]))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"device": "cuda", "devices": [-1]}, "a number from 0 on, or a name such as"),
        ({"device": "cuda", "devices": ["0"]}, "a number from 0 on, or a name such as"),
        ({"device": "cuda", "devices": [True]}, "engine.devices"),
        ({"device": "cuda", "devices": 1}, "engine.devices: must be a list, not 1"),
        ({"devices": [0]}, "engine.devices names GPUs, and engine.device is cpu"),
        ({"kv_memory_mib": 0}, "engine.kv_memory_mib must be 1 or more on cpu, not 0"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_config({"engine": settings})


def test_defaults_are_of_the_devices_size() -> None:
    cpu, cuda = parse_config({}), parse_config({"engine": {"device": "cuda"}})
    assert (cpu.engine.max_step_tokens, cpu.engine.max_running, cpu.engine.kv_memory_mib) == (512, 64, 512)
    assert (cuda.engine.max_step_tokens, cuda.engine.max_running, cuda.engine.kv_memory_mib) == (8192, 256, 0)
    assert (cpu.worker.frame_bytes, cuda.worker.frame_bytes) == (2 << 20, 8 << 20)
    said = parse_config({"engine": {"device": "cuda", "max_running": 3}, "worker": {"frame_bytes": 4096, "port": 7}})
    assert (said.engine.max_running, said.engine.max_step_tokens) == (3, 8192)
    assert (said.worker.frame_bytes, said.worker.port) == (4096, 7)
    # What a child is given says all of it.
    assert parse_config(cuda.model_dump()) == cuda


def test_ray_places_gpus_itself() -> None:
    config = parse_config({"engine": {"device": "cuda", "devices": [0, 1]}})
    check_pools(config, on_ray=False)
    with pytest.raises(ConfigError, match=r"engine\.devices is for the workers of one machine"):
        check_pools(config, on_ray=True)


def test_a_worker_without_a_gpu_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert run_worker(worker_kind(frozenset(Role)), parse_config({"engine": {"device": "cuda"}}), "127.0.0.1:1") == 2
    assert "error: engine.device is cuda, but torch sees no CUDA device here" in capfd.readouterr().err


def test_a_machine_without_the_driver_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(gpus.ctypes, "CDLL", no_driver)
    assert count_gpus() == 0
