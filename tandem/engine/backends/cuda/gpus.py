"""Which GPU each worker gets. No torch: CUDA_VISIBLE_DEVICES must be set before it is imported."""

from __future__ import annotations

import ctypes
import os

from tandem.config import EngineConfig
from tandem.errors import ConfigError

VARIABLE = "CUDA_VISIBLE_DEVICES"


def share_gpus(config: EngineConfig, workers: int) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each worker; none for engines on another device.

    Raises ConfigError when there are fewer GPUs than workers, and nothing says who shares one.
    """
    if config.device != "cuda":
        return []
    if config.devices:
        if len(config.devices) < workers:
            raise ConfigError(
                f"engine.devices must name a GPU for each of {workers} workers, and names {len(config.devices)}; "
                "workers share one that is named again",
                field="engine.devices",
            )
        used = config.devices[:workers]
        if len({*used}) < workers and not (config.num_blocks or config.kv_memory_mib):
            raise ConfigError(
                "workers that share a GPU (engine.devices) must be told how much of it each may take: "
                "engine.kv_memory_mib or engine.num_blocks",
                field="engine.kv_memory_mib",
            )
        return [_name(device) for device in used]
    count = count_gpus()
    if count < workers:
        who = "a worker needs a GPU" if workers == 1 else f"{workers} workers need a GPU each"
        raise ConfigError(
            f"{who}, and this machine shows {count}{seen()}: start fewer, or say in engine.devices which GPU is whose; "
            "workers share one that is named again",
            field="engine.devices",
        )
    return [_name(index) for index in range(workers)]


def take_gpu(config: EngineConfig) -> None:
    """For a worker that was started alone: this process sees the GPU that engine.devices names. Raises ConfigError."""
    if len(config.devices) > 1:
        raise ConfigError(
            f"engine.devices must name one GPU for one worker, and names {len(config.devices)}", field="engine.devices"
        )
    if config.devices:
        os.environ[VARIABLE] = _name(config.devices[0])


def count_gpus() -> int:
    """GPUs that CUDA shows to this process; 0 without NVIDIA's driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


def _name(device: int | str) -> str:
    """As CUDA_VISIBLE_DEVICES of a child has it: its numbers are those of the machine. Raises ConfigError."""
    visible = os.environ.get(VARIABLE)
    if isinstance(device, str) or visible is None:
        return str(device)
    names = [name.strip() for name in visible.split(",") if name.strip()]
    if device >= len(names):
        raise ConfigError(
            f"engine.devices names GPU {device}, counted from 0, and this process sees {len(names)}{seen()}",
            field="engine.devices",
        )
    return names[device]


def seen() -> str:
    """What CUDA_VISIBLE_DEVICES says, for an error message."""
    visible = os.environ.get(VARIABLE)
    return "" if visible is None else f" ({VARIABLE}={visible})"
