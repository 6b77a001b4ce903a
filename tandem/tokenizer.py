"""A model's tokenizer, as transformers' AutoTokenizer makes it from whatever files there are; or a refusal."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from tandem.config import ModelConfig
from tandem.errors import ConfigError, ModelRefused
from tandem.hub import source_of
from tandem.model_files import require_readable

log = logging.getLogger(__name__)

_SETTINGS = "tokenizer_config.json"
_WHOLE = "tokenizer.json"
# Files that hold a vocabulary, under all the names that transformers' tokenizers know.
_VOCABULARY = re.compile(
    r"tokenizer(\..+)?\.json|.*vocab.*|merges\.txt|dict\.txt|tekken\.json|.+\.(model|bpe|tiktoken)"
)


def quieten_transformers() -> None:
    """Its words go where all others go, and its warnings are for those who debug: why a model is refused is told once,
    in words of our own.
    """
    from transformers.utils import logging as library

    library.disable_default_handler()
    library.enable_propagation()
    library.set_verbosity(logging.WARNING if log.isEnabledFor(logging.DEBUG) else logging.ERROR)
    library.disable_progress_bar()  # a worker's output is a log, not a terminal


def load_tokenizer(model: ModelConfig) -> Any | None:
    """A transformers.PreTrainedTokenizerFast; None when the model has no tokenizer.

    Raises ConfigError for a model that is not there, and ModelRefused for a tokenizer that would not be served exactly.
    """
    source = source_of(model.path)
    require_readable(model, source)
    files = _files(source)
    if not any(map(_VOCABULARY.fullmatch, files)):
        if _SETTINGS in files:
            raise _refusal(model, f"its {_SETTINGS} comes without any vocabulary")
        return None
    try:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast
    except ModuleNotFoundError as error:
        words = f"the model's tokenizer needs {error.name}: pip install -c constraints.txt -e '.[http]' in a checkout"
        raise ConfigError(words, field="model.path") from None
    quieten_transformers()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # of the files, in the words of several libraries
        lines = str(error).strip().splitlines() or [type(error).__name__]
        why = _fault(Path(source, _WHOLE)) or f"transformers cannot load it: {lines[0]}"
        raise _refusal(model, why) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise _refusal(model, f"{type(tokenizer).__name__} is no fast one (made of the tokenizers library)")
    return tokenizer


def _fault(path: Path) -> str:
    """Of a tokenizer.json, in the words of the library that reads it, which do not name it. Empty: none."""
    from tokenizers import Tokenizer

    try:
        if os.path.lexists(path):
            Tokenizer.from_file(str(path))
    except Exception as error:  # the library has no class of its own
        return f"its {path.name} cannot be read: {error}"
    return ""


def _files(source: str) -> list[str]:
    if Path(source).is_dir():
        return [each.name for each in Path(source).iterdir()]
    try:
        return HfApi().list_repo_files(source)
    except Exception as error:  # of the network: each release of huggingface_hub has its own
        raise ConfigError(f"the hub does not say what files {source} has: {error}", field="model.path") from None


def _refusal(model: ModelConfig, reason: str) -> ModelRefused:
    words = f"{model.served_name} is refused: its tokenizer would not be served exactly: {reason}"
    return ModelRefused(words, field="model.path")
