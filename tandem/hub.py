"""A model by its hub id: asked for once, before transformers and tokenizers begin to retry in the dark."""

from __future__ import annotations

import logging
from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

from tandem.errors import ConfigError

log = logging.getLogger(__name__)

# One question, one answer of a few kilobytes: a hub that takes longer cannot serve gigabytes.
ANSWER_S = 10.0


def source_of(model: str) -> str:
    """What to load a model from: its directory, its hub id, or its cached copy when the hub cannot be reached.

    Raises ConfigError for a model that cannot be had at all: not cached and out of reach, or unknown to the hub.
    """
    if Path(model).is_dir():
        return model
    # The library has a handler of its own, beside that of our root logger.
    logging.getLogger("huggingface_hub").handlers.clear()
    try:
        HfApi().model_info(model, timeout=ANSWER_S)
    except HFValidationError:
        raise _missing(model, "it is no hub id either") from None
    except RepositoryNotFoundError:
        raise _missing(model, "the hub has no such model, or shows it only to those who log in") from None
    except HfHubHTTPError as error:
        log.warning("the hub answered, but not well: %s", error)  # the download may have better luck
    except Exception as error:  # of the network: each release of huggingface_hub has its own
        return _cached(model, error)
    return model


def _cached(model: str, why: Exception) -> str:
    file = try_to_load_from_cache(model, "config.json")
    if not isinstance(file, str):
        raise _missing(model, f"it is not in the local cache, and the hub cannot be reached ({why})") from None
    log.warning("the hub cannot be reached (%s): taking %s from the local cache", why, model)
    return str(Path(file).parent)


def _missing(model: str, reason: str) -> ConfigError:
    return ConfigError(f"cannot load the model {model}: there is no such directory; {reason}", field="model.path")
