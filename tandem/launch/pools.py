"""Which numbers of workers make a service."""

from __future__ import annotations

from tandem.config import TandemConfig
from tandem.errors import ConfigError


def check_pools(config: TandemConfig) -> None:
    """Raises ConfigError unless somebody plays each role, and for settings that two workers cannot share."""
    serve = config.serve
    workers = serve.prefill + serve.decode + serve.colocated
    if workers == 0:
        raise ConfigError("no workers: give serve.prefill and serve.decode, or serve.colocated", field="serve")
    if not serve.colocated and not (serve.prefill and serve.decode):
        missing = "decode" if serve.prefill else "prefill"
        raise ConfigError(f"nobody would play {missing}: serve.{missing} is 0", field=f"serve.{missing}")
    for key in ("port", "advertise"):
        if getattr(config.worker, key) and workers > 1:
            raise ConfigError(
                f"worker.{key} can belong to one worker only, and this starts more", field=f"worker.{key}"
            )
