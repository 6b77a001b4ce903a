"""One configuration for the whole service: composed, frozen, validated; an unknown key is refused by name.

Read from YAML (or JSON, its subset) with `load_config`; every process gets the same file and reads its sections.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tandem.addresses import dialable
from tandem.errors import ConfigError

TINY_MODEL = Path(__file__).parent / "assets" / "tiny"
_DEVICE = re.compile(r"[A-Za-z0-9_.:-]+")
# By pydantic's name of the error, where its own words speak of Python.
_IN_WORDS = {"model_type": "must hold keys with values", "tuple_type": "must be a list"}


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelConfig(Section):
    """Which model, and how it is loaded."""

    # A local directory, or a hub id.
    path: str = str(TINY_MODEL)
    # The name that clients see; the directory's or id's last part if empty.
    name: str = ""
    # "dummy": random weights from config.json alone, for load tests.
    load_format: Literal["auto", "dummy"] = "auto"
    # "auto": the checkpoint's own on cuda, float32 on cpu.
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    # Prompt and output together, tokens; 0: the model's own limit.
    max_model_len: int = Field(0, ge=0)
    # Of dummy weights.
    seed: int = Field(0, ge=0)

    @field_validator("path")
    @classmethod
    def _exists(cls, path: str) -> str:
        # A hub id has at most one slash and none in front; anything else means a directory.
        if (path.startswith(("/", ".", "~")) or path.count("/") > 1) and not Path(path).is_dir():
            raise ValueError(f"there is no such directory: {path}")
        return path

    @property
    def served_name(self) -> str:
        return self.name or Path(self.path).name


class EngineConfig(Section):
    """One engine: its device, its KV pool, its steps."""

    device: Literal["cpu", "cuda"] = "cpu"
    # Tokens in a KV block; 0: 16 on cpu, 256 on cuda (its attention kernel's page).
    block_size: int = Field(0, ge=0, le=1024)
    # Blocks in the pool; 0: as many as kv_memory_mib holds.
    num_blocks: int = Field(0, ge=0)
    kv_memory_mib: int = Field(512, ge=1)
    # Tokens that one step may process: decodes first, then prefill chunks.
    max_step_tokens: int = Field(512, ge=1)
    # Sequences that one step may decode.
    max_running: int = Field(64, ge=1)
    # Prompts that may wait for prefill; one more is refused as overloaded.
    max_waiting: int = Field(256, ge=1)
    prefix_cache: bool = True
    # Torch threads; 0: one per core that this process may use.
    threads: int = Field(0, ge=0)


class WorkerConfig(Section):
    """What a worker process adds to its engine."""

    host: str = "127.0.0.1"
    # 0: any free port.
    port: int = Field(0, ge=0, le=65535)
    # host:port that others reach this worker by; empty: host and the port it got.
    advertise: str = ""
    # Reserve calls that may wait for blocks; one more is refused as overloaded.
    max_waiting_reservations: int = Field(256, ge=0)
    # KV frames are cut to about this many bytes.
    frame_bytes: int = Field(2 << 20, ge=1 << 12, le=1 << 24)
    # And those whose payload goes another way, through Ray's object store, shared memory or (at most 4 MiB) NIXL, to
    # about this many.
    object_bytes: int = Field(16 << 20, ge=1 << 12, le=1 << 24)
    # In which numbers this worker sends KV over grpc and ray; it receives any. int8 is lossy: fewer bytes, and tokens
    # may differ from those of one worker alone.
    wire_dtype: Literal["native", "int8"] = "native"
    # Network devices that NIXL may use to write KV into other workers' pools and have it written into this one's, with
    # commas between: "eth0", "mlx5_0:1". Empty: not by NIXL. Whoever reaches its ports on them can write this process's
    # memory: only of networks that workers alone can reach.
    nixl_devices: str = Field("", max_length=256)
    # Frames that a receiver takes in before the sender must wait, per transfer.
    frames_in_flight: int = Field(8, ge=1, le=256)
    # A stopping worker waits this long for live requests.
    drain_timeout_s: float = Field(30.0, ge=0)

    @field_validator("nixl_devices")
    @classmethod
    def _device_names(cls, devices: str) -> str:
        if devices and not all(_DEVICE.fullmatch(device) for device in devices.split(",")):
            raise ValueError(f"names of devices with commas between, such as eth0,mlx5_0:1, not {devices!r}")
        return devices

    @field_validator("advertise")
    @classmethod
    def _dialable(cls, advertise: str) -> str:
        return advertise and dialable(advertise)


class RouterConfig(Section):
    # The router listens on loopback too, on the same port: the end of an ssh tunnel.
    host: str = "127.0.0.1"
    port: int = Field(8700, ge=0, le=65535)
    # Of the OpenAI-compatible HTTP door, on the same hosts. 0: any free port; -1: no such door.
    http_port: int = Field(8701, ge=-1, le=65535)
    # By which requests over loopback may name this machine in `Host`, besides its addresses and localhost: those of a
    # proxy on this machine.
    http_names: tuple[str, ...] = ()
    # Requests in the house at once, a request for n answers counting as n; one more is refused as overloaded.
    max_live_requests: int = Field(1024, ge=1, le=1 << 14)
    # Of a request that brings no deadline, seconds.
    default_deadline_s: float = Field(600.0, gt=0)
    max_deadline_s: float = Field(3600.0, gt=0)
    # Of a reservation that is not sealed; frames and the router's renewals extend it.
    lease_s: float = Field(10.0, gt=0)
    heartbeat_interval_s: float = Field(0.5, gt=0)
    # A worker that is silent for this long is out of routing and its requests fail.
    # Below 5 s, so that a host that was cut off is out of it within 5 s.
    heartbeat_timeout_s: float = Field(4.0, gt=0)
    # How KV goes between two workers. "auto": the best that both share, as docs/kv_transfer.md says; any other name: by
    # that one, or not at all. Either way the second attempt after a failed transfer goes by grpc.
    transport: Literal["auto", "shm", "grpc", "ray", "nixl"] = "auto"
    # A request message, the body of an HTTP request, or the vectors of an Embed call may be this large; workers, who
    # get requests next, take no more than 16 MiB.
    max_message_bytes: int = Field(4 << 20, ge=1 << 10, le=1 << 24)


class ServeConfig(Section):
    """How many workers `tandem serve` starts on this machine."""

    prefill: int = Field(1, ge=0, le=64)
    decode: int = Field(1, ge=0, le=64)
    colocated: int = Field(0, ge=0, le=64)


class TandemConfig(Section):
    model: ModelConfig = ModelConfig()
    engine: EngineConfig = EngineConfig()
    worker: WorkerConfig = WorkerConfig()
    router: RouterConfig = RouterConfig()
    serve: ServeConfig = ServeConfig()


def load_config(path: Path | None = None, overrides: dict[str, dict[str, Any]] | None = None) -> TandemConfig:
    """The file's settings with overrides (section → key → value; None values are skipped) on top.

    Raises ConfigError naming the key, its limit, and for an unknown key the nearest right one.
    """
    settings = {} if path is None else _read(path)
    for section, values in (overrides or {}).items():
        given = {key: value for key, value in values.items() if value is not None}
        from_file = settings.get(section) or {}
        if given and isinstance(from_file, dict):  # anything else is refused below
            settings[section] = {**from_file, **given}
    return parse_config(settings)


def parse_config(settings: dict[str, Any]) -> TandemConfig:
    """Raises ConfigError for the first thing wrong."""
    try:
        return TandemConfig.model_validate(settings)
    except ValidationError as error:
        raise _explain(error) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read config file {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} is not valid YAML: {error}") from None
    if not isinstance(settings or {}, dict):
        raise ConfigError(f"config file {path} must hold sections ({', '.join(TandemConfig.model_fields)})")
    return settings or {}


def _explain(error: ValidationError) -> ConfigError:
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    key = ".".join(location)
    if first["type"] == "extra_forbidden":
        # Only keys of the same depth: `worker.xyzzy` is no misspelling of `worker`.
        candidates = [known for known in _known_keys() if known.count(".") == key.count(".")]
        nearest = difflib.get_close_matches(key, candidates, n=1, cutoff=0.0)
        return ConfigError(f"unknown config key {key}; did you mean {nearest[0]}?", field=key)
    if first["type"] == "value_error":
        return ConfigError(f"config key {key}: {first['ctx']['error']}", field=key)
    words = _IN_WORDS.get(first["type"], first["msg"][0].lower() + first["msg"][1:])
    return ConfigError(f"config key {key}: {words}, not {first['input']!r}", field=key)


def _known_keys() -> list[str]:
    sections = TandemConfig.model_fields
    nested = [
        f"{name}.{key}"
        for name, info in sections.items()
        for key in info.annotation.model_fields  # type: ignore[union-attr]
    ]
    return [*sections, *nested]
