"""Loads a checkpoint that is whole: all that the model needs is in its files, in the shapes that the model has.

What is missing or of another shape transformers fills with random or default numbers, and says so in a log.
"""

from __future__ import annotations

import copy
import json
import logging
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from tandem.errors import ModelRefused
from tandem.model_files import fault_of

log = logging.getLogger(__name__)

_NAMED = 5


def load_whole(source: str, config: Any, **settings: Any) -> nn.Module:
    """source: a directory or hub id; config: the model's, from there; settings: as from_pretrained takes them.

    Raises ModelRefused, naming the first tensors at fault, when the files do not hold what the model needs; tied
    weights are needed once. Logs once what the files hold beyond that.
    """
    reporter = logging.getLogger("transformers.modeling_utils")
    reporter.addFilter(_no_report)
    try:
        _refuse_by_headers(source, config)
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


def _refuse_by_headers(source: str, config: Any) -> None:
    """As load_whole, of a directory, and before any memory is taken: transformers fills what is missing with random
    numbers, which takes minutes for billions. Says nothing of what shows only when it is loaded.
    """
    try:
        if not (tensors := _headers(source, config)):
            return
        model, found = _loaded_on_no_device(config, tensors)
    except (SafetensorError, ModelRefused):
        raise
    except Exception:  # the configuration's, or of a transformers that loads otherwise: the load itself will tell
        log.debug("it shows only when the model is loaded whether its files are whole", exc_info=True)
        return
    _refuse_holes(model, found)


def _loaded_on_no_device(config: Any, tensors: dict[str, Tensor]) -> tuple[Any, dict[str, Any]]:
    """A model on the meta device, and what from_pretrained would say of it and these tensors.

    By the parts that from_pretrained is made of: it renames tensors and puts them together, and would fill the holes.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    with torch.device("meta"):
        given = copy.deepcopy(config)
        model = AutoModelForCausalLM.from_config(given, attn_implementation="eager", trust_remote_code=False)
    nowhere, renamed = {"": torch.device("meta")}, get_model_conversion_mapping(model)
    plan = LoadStateDictConfig(ignore_mismatched_sizes=True, device_map=nowhere, weight_mapping=renamed)
    found, _ = convert_and_load_state_dict_in_model(model, tensors, plan, disk_offload_index=None)
    if found.conversion_errors:
        raise RuntimeError(f"cannot be put together: {_some(found.conversion_errors)}")
    model.tie_weights(missing_keys=found.missing_keys, recompute_mapping=False)
    model._adjust_missing_and_unexpected_keys(found)
    return model, found.to_dict()


def _headers(source: str, config: Any) -> dict[str, Tensor]:
    """Tensors without memory for what the files of a directory hold; none where other files count too, or the weights
    become others when they are loaded. Raises SafetensorError, or ModelRefused for an index that cannot be read.
    """
    if any(getattr(each, "quantization_config", None) for each in (config, config.get_text_config())):
        return {}
    if getattr(config, "transformers_weights", None) or getattr(type(config), "extra_files", None):
        return {}
    if Path(source, "adapter_config.json").exists():  # the weights below it are somewhere else
        return {}
    files, index = [Path(source, SAFE_WEIGHTS_NAME)], Path(source, SAFE_WEIGHTS_INDEX_NAME)
    if not files[0].is_file() and index.is_file():
        if fault := fault_of(index):
            raise ModelRefused(f"its {index.name} {fault}")
        shards = json.loads(index.read_text()).get("weight_map")
        files = [Path(source, name) for name in sorted(set(shards.values()))] if isinstance(shards, dict) else []
    if not all(file.is_file() for file in files):
        return {}
    found = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no dictionary)
                found[name] = torch.empty(tensors.get_slice(name).get_shape(), device="meta")
    return found


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
