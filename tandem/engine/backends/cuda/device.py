"""What a CUDA device is asked besides arithmetic: is it usable, what room has it, and is an error its end?"""

from __future__ import annotations

import torch

from tandem.config import EngineConfig
from tandem.engine.backends.cuda.gpus import seen
from tandem.errors import ConfigError
from tandem.out_of_memory import is_out_of_memory


class DeviceLost(RuntimeError):
    """Nothing can be computed on the device any more: a CUDA error stays, and every later call raises it again.

    A new process may do better.
    """


def require_device(config: EngineConfig) -> None:
    """Raises ConfigError unless this torch can compute on the device."""
    if config.device == "cpu":
        return
    if not torch.cuda.is_available():
        raise ConfigError(f"engine.device is cuda, but torch sees no CUDA device here{seen()}", field="engine.device")
    name = torch.cuda.get_device_name()
    try:
        torch.zeros(1, device="cuda").add_(1)
        torch.cuda.synchronize()
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise ConfigError(
                f"{name} has no memory left: another process has all of it", field="engine.device"
            ) from None
        if "no kernel image" not in str(error):
            raise DeviceLost(f"{name} does not compute: {first_line(error)}") from error
        major, minor = torch.cuda.get_device_capability()
        built = ", ".join(torch.cuda.get_arch_list())
        raise ConfigError(
            f"this torch ({torch.__version__}) is built for {built}, and {name} is sm_{major}{minor}",
            field="engine.device",
        ) from None


def is_lost(error: BaseException, device: str) -> bool:
    """Whether an error of a step leaves the device unusable. Waits for the device."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, torch.AcceleratorError) and not is_out_of_memory(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    # Libraries raise errors of their own for it.
    return why_lost(device) != ""


def why_lost(device: str) -> str:
    """Why the device cannot be used any more; empty if it can. Waits for the device."""
    if device == "cpu" or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return ""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return first_line(error)
    return ""


def free_memory(device: str) -> None:
    """What torch keeps for later goes back to the device."""
    if device != "cpu":
        torch.cuda.empty_cache()


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
