"""Options that several commands have, written once: a dataclass of them stands for all in a command's signature."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any, get_type_hints


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
