"""Loads a checkpoint that is whole: all that the model needs is in its files, in the shapes that the model has.

What is missing or of another shape transformers fills with random or default numbers, and says so in a log.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM

from tandem.errors import ModelRefused

log = logging.getLogger(__name__)

_NAMED = 5


def load_whole(source: str, **settings: Any) -> nn.Module:
    """source: a directory or hub id; settings: as from_pretrained takes them.

    Raises ModelRefused, naming the first tensors at fault, when the files do not hold what the model needs; tied
    weights are needed once. Logs once what the files hold beyond that.
    """
    reporter = logging.getLogger("transformers.modeling_utils")
    reporter.addFilter(_no_report)
    try:
        # safetensors only: a pickled checkpoint could run code. Shapes that differ are ignored here to be named below.
        model, found = AutoModelForCausalLM.from_pretrained(
            source, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **settings
        )
    except SafetensorError as error:
        raise ModelRefused(f"{_unreadable(source)}: {error}") from error
    except RuntimeError as error:
        if unfit := _unfit(error):
            raise ModelRefused(f"its files do not hold {_count(unfit)} as the model needs: {_some(unfit)}") from error
        raise
    finally:
        reporter.removeFilter(_no_report)
    _refuse_holes(model, found)
    if unused := sorted(found["unexpected_keys"]):
        log.warning("the model does not use %s of its files: %s", _count(unused), _some(unused))
    loaded: nn.Module = model
    return loaded


def _refuse_holes(model: nn.Module, found: dict[str, Any]) -> None:
    # In the model's own order.
    needed = [name for name in model.state_dict() if name in found["missing_keys"]]
    shapes = {name: f"{name} is {list(theirs)}, not {list(ours)}" for name, theirs, ours in found["mismatched_keys"]}
    complaints = []
    if needed:
        complaints.append(f"its files lack {_count(needed)} that the model needs: {_some(needed)}")
    if shapes:
        complaints.append(
            f"{_count(shapes)} of its files differ in shape from the model's: {_some(map(shapes.get, sorted(shapes)))}"
        )
    if complaints:
        raise ModelRefused("; ".join(complaints))


def _no_report(record: logging.LogRecord) -> bool:
    """Drops transformers' own table of what is missing, of another shape or unused: it is told here."""
    return "LOAD REPORT" not in record.getMessage()


def _unfit(error: RuntimeError) -> list[str]:
    """What could not be put together from several tensors, such as an expert's share of a fused weight.

    transformers keeps the names in the record that it refuses over, and in a table for people; not in the error.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if errors := getattr(frame.f_locals.get("loading_info"), "conversion_errors", None):
            return sorted(errors)
    return []


def _unreadable(source: str) -> str:
    """The file that safetensors cannot read, which its error does not name."""
    for file in sorted(Path(source).glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError:
            return file.name
    return "its weights"


def _count(names: Iterable[str]) -> str:
    number = len(list(names))
    return "1 tensor" if number == 1 else f"{number} tensors"


def _some(names: Iterable[Any]) -> str:
    first = [str(name) for name in names]
    return ", ".join(first[:_NAMED]) + (", ..." if len(first) > _NAMED else "")
