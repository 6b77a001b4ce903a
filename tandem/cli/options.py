"""Options that several commands have, written once: alone, or as a dataclass that stands for all of its fields in a
command's signature.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from tandem.addresses import dialable
from tandem.config import TandemConfig, load_config


def _address(value: str | None) -> str | None:
    try:
        return None if value is None else dialable(value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


RouterOption = Annotated[
    str, typer.Option("--router", metavar="HOST:PORT", callback=_address, help="The router's address.")
]
AdvertiseOption = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", callback=_address, help="How others reach it.")
]


class Device(StrEnum):
    CPU = "cpu"
    CUDA = "cuda"


class LoadFormat(StrEnum):
    AUTO = "auto"
    DUMMY = "dummy"


class LogLevel(StrEnum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class LogFormat(StrEnum):
    TEXT = "text"
    JSON = "json"


@dataclass(frozen=True)
class ServedOptions:
    """What is served, and the file that says all the rest."""

    model: Annotated[
        str | None, typer.Option(metavar="DIR_OR_HUB_ID", help="The model; a tiny one of our own if not given.")
    ] = None
    load_format: Annotated[LoadFormat | None, typer.Option(help="dummy: random weights, for load tests.")] = None
    device: Annotated[Device | None, typer.Option(help="Where engines run.")] = None
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML or JSON; tandem/config.py lists its keys.")
    ] = None

    def settings(self, **sections: dict[str, Any]) -> TandemConfig:
        """The file's, with what was typed in their place; sections: what other options say. Raises ConfigError."""
        model = {"path": self.model, "load_format": self.load_format}
        engine = {"device": self.device, **sections.pop("engine", {})}
        return load_config(self.config, {"model": model, "engine": engine, **sections})


@dataclass(frozen=True)
class LogOptions:
    log_level: Annotated[
        LogLevel | None,
        typer.Option(case_sensitive=False, help="Log lines from this level upwards; info if not given."),
    ] = None
    log_format: Annotated[
        LogFormat | None, typer.Option(case_sensitive=False, help="json: one object a line; text if not given.")
    ] = None

    def section(self) -> dict[str, Any]:
        return {"level": self.log_level, "format": self.log_format}


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """The command with every parameter whose type is a dataclass replaced by that dataclass's fields, as Typer sees it.

    All are passed by name, so their order is that of the help page and nothing else.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}

    def spread(**given: Any) -> None:
        for name, group in groups.items():
            fields = [field.name for field in dataclasses.fields(group)]
            given[name] = group(**{field: given.pop(field) for field in fields})
        command(**given)

    parameters = list(_parameters(command, hints, groups))
    spread.__name__, spread.__doc__ = command.__name__, command.__doc__
    spread.__annotations__ = {each.name: each.annotation for each in parameters}
    spread.__dict__["__signature__"] = inspect.Signature(parameters)
    return spread


def _parameters(
    command: Callable[..., None], hints: dict[str, Any], groups: dict[str, Any]
) -> Iterator[inspect.Parameter]:
    kind = inspect.Parameter.KEYWORD_ONLY
    for name, parameter in inspect.signature(command).parameters.items():
        if name not in groups:
            yield inspect.Parameter(name, kind, default=parameter.default, annotation=hints[name])
            continue
        field_hints = get_type_hints(groups[name], include_extras=True)
        for field in dataclasses.fields(groups[name]):
            yield inspect.Parameter(field.name, kind, default=field.default, annotation=field_hints[field.name])
