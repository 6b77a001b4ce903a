"""The lengths that a model's configuration names, and a way to cross them with a short prompt.

Windows, chunks, scales by position and changes of rope begin to matter at lengths of thousands of tokens. A check at
load cannot be so long: it makes the lengths short instead, in the configuration and in the modules that have noted
them or what follows from them, for transformers' own forward and for Tandem's alike.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedConfig

log = logging.getLogger(__name__)

# What a threshold becomes.
SHORT = 5
# Numbers in a configuration that have nothing to do with length, by a word of their name: left out to save time, as
# changing them breaks a model or changes all of its output, which shows that they are no thresholds.
_OTHER = re.compile(
    r"(^|_)(vocab|hidden|intermediate|num|head|heads|dim|rank|theta|softcapping|scalar|layer|layers|experts"
    r"|embd|inner|kernel|hash|group|groups|multiplier)(_|$)|token_(id|ids|index)$"
)
# Words of lengths and positions, which count whatever else a name says.
_LENGTH = re.compile(r"(^|_)(window|windows|chunk|length|len|position|positions|context|span|stride)(_|$)")


def named_lengths(model: Any, least: int, most: int) -> dict[str, int]:
    """Numbers of the configuration, from least to most, by name, that may be lengths."""
    found: dict[str, int] = {}
    for values, key, name in _numbers(model):
        if least <= values[key] <= most and (_LENGTH.search(name) or not _OTHER.search(name)):
            found.setdefault(name, int(values[key]))
    return found


@contextmanager
def shortened(model: Any, lengths: dict[str, int]) -> Iterator[None]:
    """Inside, these are SHORT wherever the model looks for them. Buffers are put back as they were, too."""
    places = [(values, key, SHORT) for values, key, name in _numbers(model) if lengths.get(name) == values[key]]
    buffers = [(module, dict(module._buffers), _copies(module)) for module in model.modules()]
    places += list(_noted(model, lengths))
    before = [(values, key, values[key]) for values, key, _ in places]
    attributes = [(vars(module), dict(vars(module))) for module in model.modules()]
    try:
        for values, key, short in places:
            values[key] = type(values[key])(short)
        yield
    finally:
        for now, then in attributes:
            now.clear()
            now.update(then)
        for module, then_buffers, copies in buffers:
            module._buffers.clear()
            module._buffers.update(then_buffers)
            for name, saved in copies.items():
                then_buffers[name].copy_(saved)
        for values, key, value in before:
            values[key] = value


def _copies(module: Any) -> dict[str, Any]:
    return {name: buffer.clone() for name, buffer in module._buffers.items() if buffer is not None}


def _numbers(model: Any) -> Iterator[tuple[Any, Any, str]]:
    """Where whole numbers stand in the model's configurations: container, key, and the name of it."""
    seen: set[int] = set()
    configs = [model.config, *(getattr(module, "config", None) for module in model.modules())]
    for config in configs:
        if isinstance(config, PreTrainedConfig):
            yield from _within(vars(config), "", seen)


def _within(values: Any, name: str, seen: set[int]) -> Iterator[tuple[Any, Any, str]]:
    if id(values) in seen:
        return
    seen.add(id(values))
    for key, value in list(values.items() if isinstance(values, dict) else enumerate(values)):
        called = key if isinstance(key, str) else name
        if isinstance(value, PreTrainedConfig):
            yield from _within(vars(value), called, seen)
        elif isinstance(value, dict | list):
            yield from _within(value, called, seen)
        elif _is_number(value):
            yield values, key, called


def _noted(model: Any, lengths: dict[str, int]) -> Iterator[tuple[dict[str, Any], str, int]]:
    """Attributes of modules that a model with these lengths short would have smaller, and what they would be.

    Told by building it: neither the name nor the value of what a module notes says where it comes from.
    """
    if not lengths:
        return
    shorter = [twin for twin in (_attributes_of_twin(model, lengths),) if twin]
    # Some are no lengths, and no model can be made with them.
    shorter = shorter or [_attributes_of_twin(model, {name: length}) for name, length in lengths.items()]
    plain = _attributes_of_twin(model, {})
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if not _is_number(value) or plain.get((path, name)) != value:
                continue
            short = min(twin.get((path, name), value) for twin in shorter)
            if short < value:
                yield vars(module), name, short


def _attributes_of_twin(model: Any, lengths: dict[str, int]) -> dict[tuple[str, str], int]:
    """Whole numbers that modules note, by path and name, of a model without memory whose configuration has these
    lengths short; none where there is no such model.
    """
    config = copy.deepcopy(model.config)
    for values, key, name in _within(vars(config), "", set()):
        if lengths.get(name) == values[key]:
            values[key] = type(values[key])(SHORT)
    config._attn_implementation = "eager"
    try:
        with torch.device("meta"):
            twin = type(model)(config)
    except Exception:  # the model's own code, of a configuration that nobody wrote
        log.debug("no model can be made with a length of %d for %s", SHORT, ", ".join(lengths), exc_info=True)
        return {}
    return {
        (path, name): int(value)
        for path, module in twin.named_modules()
        for name, value in vars(module).items()
        if _is_number(value)
    }


def _is_number(value: Any) -> bool:
    return (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and value.is_integer())
