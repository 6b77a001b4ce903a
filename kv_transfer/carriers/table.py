"""The carriers, each in one line. To read their names takes no torch: `tandem serve` checks what it is told by them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING

from tandem.config import TandemConfig
from tandem.errors import ConfigError
from tandem.types import shown

if TYPE_CHECKING:
    from kv_transfer.ends.carrier import Carrier, PoolMemory

# By name, module:Class in this package. `local` is not among them: it moves nothing, and no two workers share it.
CARRIERS: Mapping[str, str] = {
    "grpc": "grpc.carrier:GrpcCarrier",
    "shm": "shm.carrier:ShmCarrier",
    "nixl": "nixl.carrier:NixlCarrier",
    "ray": "ray.carrier:RayCarrier",
}
# What the workers of a service, on Ray or not, lack to share one; empty: nothing.
_LACKS: Mapping[str, Callable[[TandemConfig, bool], str]] = {
    "shm": lambda config, _: "" if config.engine.device == "cpu" else "KV pools in the memory of the cpu",
    "nixl": lambda config, _: "" if config.worker.nixl_devices else "worker.nixl_devices, which names no device",
    "ray": lambda _, on_ray: "" if on_ray else "workers on a Ray cluster: tandem serve --ray",
}


def carrier_class(name: str) -> type[Carrier]:
    module, _, kind = CARRIERS[name].partition(":")
    found: type[Carrier] = getattr(import_module(f"kv_transfer.carriers.{module}"), kind)
    return found


def make_carriers(config: TandemConfig, memory: PoolMemory) -> list[Carrier]:
    """Those that this process can have; before its model is loaded. Raises ConfigError."""
    check_known(config)
    made = (carrier_class(name).make(config.worker, memory) for name in CARRIERS)
    return [carrier for carrier in made if carrier is not None]


def check_known(config: TandemConfig) -> None:
    """Raises ConfigError for a `router.transport` that is no carrier."""
    ordered = config.router.transport
    if ordered != "auto" and ordered not in CARRIERS:
        known = ", ".join(("auto", *CARRIERS))
        raise ConfigError(
            f"config key router.transport: must be one of {known}, not {shown(ordered)}", field="router.transport"
        )


def check_shared(config: TandemConfig, on_ray: bool) -> None:
    """Raises ConfigError for one that no two workers share: the service would come up, and refuse every request."""
    ordered = config.router.transport
    lacks = _LACKS[ordered](config, on_ray) if ordered in _LACKS else ""
    if lacks:
        raise ConfigError(f"router.transport {ordered} needs {lacks}", field="router.transport")
