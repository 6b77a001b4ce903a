"""Which numbers of workers make a service, and which KV transports they can have between them."""

from __future__ import annotations

from kv_transfer.carriers.table import check_known, check_shared
from tandem.config import TandemConfig
from tandem.errors import ConfigError


def check_pools(config: TandemConfig, on_ray: bool) -> None:
    """Raises ConfigError unless somebody plays each role, and for settings that these workers cannot share."""
    serve = config.serve
    workers = serve.prefill + serve.decode + serve.colocated
    if workers == 0:
        raise ConfigError("no workers: give serve.prefill and serve.decode, or serve.colocated", field="serve")
    if not serve.colocated and not (serve.prefill and serve.decode):
        missing = "decode" if serve.prefill else "prefill"
        raise ConfigError(f"nobody would play {missing}: serve.{missing} is 0", field=f"serve.{missing}")
    if on_ray and config.engine.devices:
        raise ConfigError(
            "engine.devices is for the workers of one machine: on a cluster Ray gives each worker a GPU of its own",
            field="engine.devices",
        )
    for key in ("port", "advertise"):
        if getattr(config.worker, key) and workers > 1:
            raise ConfigError(
                f"worker.{key} can belong to one worker only, and this starts more", field=f"worker.{key}"
            )
    check_known(config)
    if serve.prefill and serve.decode:
        check_shared(config, on_ray)
