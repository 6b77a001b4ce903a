"""One configuration for the whole service: composed, frozen, validated; an unknown key is refused by name.

Read from YAML (or JSON, its subset) with `load_config`; every process gets the same file and reads its sections.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictInt,
    ValidationError,
    field_validator,
    model_validator,
)

from tandem.addresses import dialable
from tandem.errors import ConfigError
from tandem.types import shown

TINY_MODEL = Path(__file__).parent / "assets" / "tiny"
# Blocks in a KV pool.
MOST_BLOCKS = 1 << 24
# What is not said on cuda: a GPU has room for it, and wants larger steps and frames than a processor.
_CUDA_DEFAULTS: dict[str, dict[str, Any]] = {
    "engine": {"kv_memory_mib": 0, "max_step_tokens": 8192, "max_running": 256},
    "worker": {"frame_bytes": 8 << 20},
}
_DEVICE = re.compile(r"[A-Za-z0-9_.:-]+")
_GPU = re.compile(r"(GPU|MIG)-[A-Za-z0-9/-]+")
# By pydantic's name of the error, where its own words speak of Python.
_IN_WORDS = {"model_type": "must hold keys with values", "tuple_type": "must be a list"}
# The longest deadline, as the SDK's: gRPC's own arithmetic overflows somewhere above.
_YEAR_S = 365 * 24 * 3600.0


def _no_bool(value: object) -> object:
    """Python counts with them, so `true` would be a second."""
    if isinstance(value, bool):
        raise ValueError(f"must be a number, not {value}")
    return value


Seconds = Annotated[float, BeforeValidator(_no_bool)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


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
    # Prompt and output together, tokens; 0: the model's own limit, and more than that is refused.
    max_model_len: StrictInt = Field(0, ge=0, lt=1 << 31)
    # Seed of dummy weights.
    seed: StrictInt = Field(0, ge=0, lt=1 << 64)

    @field_validator("path")
    @classmethod
    def _exists(cls, path: str) -> str:
        if not path.strip():
            raise ValueError("must be a directory or a hub id, and is empty; leave it out for the tiny model")
        # A hub id has at most one slash and none in front; anything else means a directory.
        if (path.startswith(("/", ".", "~")) or path.count("/") > 1) and not Path(path).is_dir():
            raise ValueError(f"there is no such directory: {path}")
        return path

    @property
    def served_name(self) -> str:
        # A name for `.` too.
        return self.name or Path(self.path).absolute().name


class EngineConfig(Section):
    """One engine: its device, its KV pool, its steps."""

    device: Literal["cpu", "cuda"] = "cpu"
    # Tokens in a KV block; 0: 16 on cpu, 256 on cuda (its attention kernel's page).
    block_size: StrictInt = Field(0, ge=0, le=1024)
    # GPUs of the workers that one machine starts, in the order prefill, decode, colocated: one each; workers share one
    # that is named again. Numbers count the GPUs that this process sees, from 0; texts are as CUDA_VISIBLE_DEVICES has
    # them ("GPU-5ca11ab1e"). Empty: the first worker gets the first GPU, and so on.
    devices: tuple[StrictInt | str, ...] = Field((), max_length=192)
    # Blocks in the pool; 0: as many as kv_memory_mib holds.
    num_blocks: StrictInt = Field(0, ge=0, le=MOST_BLOCKS)
    # 0, on cuda alone and its default: what the GPU has left beside the model and the largest step.
    kv_memory_mib: StrictInt = Field(512, ge=0, le=1 << 24)
    # Tokens that one step may process: decodes first, then prefill chunks. On cuda 8192.
    max_step_tokens: StrictInt = Field(512, ge=1, le=1 << 20)
    # Sequences that one step may decode. On cuda 256.
    max_running: StrictInt = Field(64, ge=1, le=1 << 16)
    # Prompts that may wait for prefill; one more is refused as overloaded.
    max_waiting: StrictInt = Field(256, ge=1, le=1 << 20)
    prefix_cache: bool = True
    # Torch threads; 0: one per core that this process may use.
    threads: StrictInt = Field(0, ge=0, le=1024)

    @model_validator(mode="after")
    def _fits_the_device(self) -> Self:
        if self.device == "cpu" and not self.kv_memory_mib:
            raise ValueError("engine.kv_memory_mib must be 1 or more on cpu, not 0; on cuda 0 is what the GPU has left")
        if self.device == "cpu" and self.devices:
            raise ValueError("engine.devices names GPUs, and engine.device is cpu (--device cuda)")
        return self

    @field_validator("devices")
    @classmethod
    def _gpu_names(cls, devices: tuple[int | str, ...]) -> tuple[int | str, ...]:
        for device in devices:
            if not (device >= 0 if isinstance(device, int) else _GPU.fullmatch(device)):
                raise ValueError(f"a number from 0 on, or a name such as GPU-5ca11ab1e, not {device!r}")
        return devices


class WorkerConfig(Section):
    """What a worker process adds to its engine."""

    host: str = "127.0.0.1"
    # 0: any free port.
    port: StrictInt = Field(0, ge=0, le=65535)
    # host:port that others reach this worker by; empty: host and the port it got.
    advertise: str = ""
    # Reserve calls that may wait for blocks; one more is refused as overloaded.
    max_waiting_reservations: StrictInt = Field(256, ge=0, le=1 << 20)
    # KV frames are cut to about this many bytes. On cuda 8 MiB.
    frame_bytes: StrictInt = Field(2 << 20, ge=1 << 12, le=1 << 24)
    # And those whose payload goes another way, through Ray's object store, shared memory or (at most 4 MiB) NIXL, to
    # about this many.
    object_bytes: StrictInt = Field(16 << 20, ge=1 << 12, le=1 << 24)
    # In which numbers this worker sends KV over grpc and ray; it receives any. int8 is lossy: fewer bytes, and tokens
    # may differ from those of one worker alone.
    wire_dtype: Literal["native", "int8"] = "native"
    # Network devices that NIXL may use to write KV into other workers' pools and have it written into this one's, with
    # commas between: "eth0", "mlx5_0:1". Empty: not by NIXL. Whoever reaches its ports on them can write this process's
    # memory: only of networks that workers alone can reach.
    nixl_devices: str = Field("", max_length=256)
    # Frames that a receiver takes in before the sender must wait, per transfer.
    frames_in_flight: StrictInt = Field(8, ge=1, le=256)
    # A stopping worker waits this long for live requests.
    drain_timeout_s: Seconds = Field(30.0, ge=0, le=_YEAR_S)

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
    port: StrictInt = Field(8700, ge=0, le=65535)
    # Port of the OpenAI-compatible HTTP door, on the same hosts; not the one above. 0: any free one; -1: no such door.
    http_port: StrictInt = Field(8701, ge=-1, le=65535)
    # By which requests over loopback may name this machine in `Host`, besides its addresses and localhost: those of a
    # proxy on this machine.
    http_names: tuple[str, ...] = ()
    # Requests under way at once, a request for n answers counting as n; one more is refused as overloaded.
    max_live_requests: StrictInt = Field(1024, ge=1, le=1 << 14)
    # Deadline of a request that brings none, seconds.
    default_deadline_s: Seconds = Field(600.0, gt=0, le=_YEAR_S)
    max_deadline_s: Seconds = Field(3600.0, gt=0, le=_YEAR_S)
    # Lease of a reservation that is not sealed; frames and the router's renewals, three in this time, extend it.
    lease_s: Seconds = Field(10.0, ge=0.1, le=3600)
    # Less than the timeout below.
    heartbeat_interval_s: Seconds = Field(0.5, ge=0.01)
    # A worker that is silent for this long is out of routing and its requests fail.
    # Below 5 s, so that a host that was cut off is out of it within 5 s.
    heartbeat_timeout_s: Seconds = Field(4.0, ge=0.1, le=3600)
    # How KV goes between two workers. "auto": the best that both share, as docs/kv_transfer.md says; a carrier's name
    # (grpc, shm, ray, nixl): by that one, or not at all; workers refuse to start with a name that they do not know.
    # Either way the second attempt after a failed transfer goes by grpc.
    transport: str = "auto"
    # Which workers serve a request: "cache_aware", or module:Class for a policy of your own (docs/extend.md).
    policy: str = Field("cache_aware", max_length=256)
    # A stopping router takes no new requests, and waits this long for live ones.
    drain_timeout_s: Seconds = Field(30.0, ge=0, le=_YEAR_S)
    # A request message, the body of an HTTP request, or the vectors of an Embed call may be this large; workers, who
    # get requests next, take no more than 16 MiB.
    max_message_bytes: StrictInt = Field(4 << 20, ge=1 << 10, le=1 << 24)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.port and self.port == self.http_port:
            raise ValueError(
                f"router.port (--port) and router.http_port (--http-port) must not be equal, and both are {self.port}"
            )
        if 2 * self.heartbeat_interval_s > self.heartbeat_timeout_s:
            raise ValueError(
                f"router.heartbeat_interval_s must be at most half of router.heartbeat_timeout_s "
                f"({self.heartbeat_timeout_s:g}), not {self.heartbeat_interval_s:g}: workers would fall silent"
            )
        return self


class ServeConfig(Section):
    """How many workers `tandem serve` starts on this machine."""

    prefill: StrictInt = Field(1, ge=0, le=64)
    decode: StrictInt = Field(1, ge=0, le=64)
    colocated: StrictInt = Field(0, ge=0, le=64)


class LogConfig(Section):
    """What every process of the service logs, and how."""

    # Level of Tandem's own lines; those of libraries from info upwards at most.
    level: Literal["debug", "info", "warning", "error"] = "info"
    # "json": one object a line.
    format: Literal["text", "json"] = "text"


class TandemConfig(Section):
    model: ModelConfig = ModelConfig()
    engine: EngineConfig = EngineConfig()
    worker: WorkerConfig = WorkerConfig()
    router: RouterConfig = RouterConfig()
    serve: ServeConfig = ServeConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_device(cls, given: Any) -> Any:
        engine = given.get("engine") if isinstance(given, dict) else None
        if not isinstance(engine, dict) or engine.get("device") != "cuda":
            return given
        sections = {name: given.get(name, {}) for name in _CUDA_DEFAULTS}
        filled = {
            name: {**_CUDA_DEFAULTS[name], **section}
            for name, section in sections.items()
            if isinstance(section, dict)  # anything else is refused next
        }
        return {**given, **filled}


def load_config(path: Path | None = None, overrides: dict[str, dict[str, Any]] | None = None) -> TandemConfig:
    """The file's settings with overrides (section → key → value; None values are skipped) on top.

    Raises ConfigError naming the key, its limit, and for an unknown key the nearest right one.
    """
    settings = {} if path is None else _read(path)
    for section, values in (overrides or {}).items():
        given = {key: value for key, value in values.items() if value is not None}
        from_file = settings.get(section)
        if given and isinstance(from_file, dict | None):  # anything else is refused below
            settings[section] = {**(from_file or {}), **given}
    return parse_config(settings)


def parse_config(settings: dict[str, Any]) -> TandemConfig:
    """A section of None, an empty one in YAML, sets nothing. Raises ConfigError for the first thing wrong."""
    empty = {name for name in TandemConfig.model_fields if settings.get(name, ...) is None}
    try:
        return TandemConfig.model_validate({name: value for name, value in settings.items() if name not in empty})
    except ValidationError as error:
        raise _explain(error) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read config file {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:  # the second of text that is none, and of numbers and dates
        raise ConfigError(f"config file {path} is not valid YAML: {error}") from None
    except RecursionError:
        raise ConfigError(f"config file {path} is not a configuration: it is nested too deeply") from None
    if not isinstance(settings, dict | None):
        raise ConfigError(f"config file {path} must hold sections ({', '.join(TandemConfig.model_fields)})")
    return settings or {}


def _explain(error: ValidationError) -> ConfigError:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        # Only keys of the same depth: `worker.xyzzy` is no misspelling of `worker`.
        candidates = [known for known in _known_keys() if known.count(".") == key.count(".")]
        nearest = difflib.get_close_matches(key, candidates, n=1, cutoff=0.0)
        return ConfigError(f"unknown config key {key}; did you mean {nearest[0]}?", field=key)
    if first["type"] == "value_error":
        words = str(first["ctx"]["error"])  # of a whole section they name its keys
        return ConfigError(words if key in TandemConfig.model_fields else f"config key {key}: {words}", field=key)
    words = _IN_WORDS.get(first["type"], first["msg"][0].lower() + first["msg"][1:])
    return ConfigError(f"config key {key}: {words}, not {shown(first['input'])}", field=key)


def _known_keys() -> list[str]:
    sections = TandemConfig.model_fields
    nested = [
        f"{name}.{key}"
        for name, info in sections.items()
        for key in info.annotation.model_fields  # type: ignore[union-attr]
    ]
    return [*sections, *nested]
