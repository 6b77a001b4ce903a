"""From a directory or hub id to a model that is known to be served exactly, or a clear refusal."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tandem.config import TandemConfig
from tandem.engine.backends.backend import Backend, backend_for
from tandem.engine.batch import AttentionOptions
from tandem.engine.kv_cache import DTYPES, LAYOUT_VERSION
from tandem.engine.loading.checkpoint import load_whole
from tandem.engine.loading.end_tokens import end_token_ids
from tandem.engine.loading.examination import examine, require_decoder_only
from tandem.engine.loading.failures import in_words, of_the_machine, refusing
from tandem.errors import ConfigError, ModelRefused, TandemError
from tandem.hub import source_of
from tandem.model_files import require_readable
from tandem.tokenizer import quieten_transformers
from tandem.types import Fingerprint, ModelInfo

log = logging.getLogger(__name__)

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# A few models choose a class by this name, and know none but transformers' own.
_UNTIL_EXAMINED = "eager"
# Settings of a configuration that say nothing about the model's function.
_VOLATILE = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "_attn_implementation"}


@dataclass(frozen=True)
class LoadedModel:
    model: nn.Module
    # What it computes on.
    backend: Backend
    info: ModelInfo
    # What each layer's attention asks for, by layer index.
    options: dict[int, AttentionOptions]
    # The attention module that a forward calls last.
    last_attention: nn.Module


def load_model(config: TandemConfig) -> LoadedModel:
    """Raises ModelRefused, saying why, when the model cannot be found, loaded or served exactly, and ConfigError for
    more tokens than it takes.
    """
    quieten_transformers()
    try:
        source = source_of(config.model.path)
        if Path(source).is_dir() and not Path(source, "config.json").is_file():
            raise ModelRefused(f"cannot load the model {config.model.path}: it has no config.json", field="model.path")
        require_readable(config.model, source)
        model_config = AutoConfig.from_pretrained(source)
        with _refusing(config, model_config):
            require_decoder_only(model_config)
        max_model_len = _max_model_len(config, model_config)  # before weights are loaded, which takes minutes
        model = _instantiate(config, source, model_config)
        eos_token_ids = end_token_ids(config.model, model)
    except TandemError:
        raise
    except Exception as error:
        if of_the_machine(error):
            raise
        raise ModelRefused(
            f"cannot load the model {config.model.path}: {in_words(error)}", field="model.path"
        ) from error
    return _examine(config, model.eval().requires_grad_(False), max_model_len, eos_token_ids)


def _instantiate(config: TandemConfig, source: str, model_config: Any) -> nn.Module:
    device = config.engine.device
    dtype: Any = backend_for(device).dtype if config.model.dtype == "auto" else getattr(torch, config.model.dtype)
    if config.model.load_format == "dummy":
        dtype = getattr(model_config, "dtype", None) or torch.float32 if dtype == "auto" else dtype
        torch.manual_seed(config.model.seed)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(model_config, dtype=dtype, attn_implementation=_UNTIL_EXAMINED)
    else:
        with _refusing(config, model_config):
            model = load_whole(source, model_config, dtype=dtype, attn_implementation=_UNTIL_EXAMINED)
    # A dummy was made on its device.
    loaded: nn.Module = model if config.model.load_format == "dummy" else model.to(device)
    return loaded


def _examine(config: TandemConfig, model: Any, max_model_len: int, eos_token_ids: tuple[int, ...]) -> LoadedModel:
    backend = backend_for(config.engine.device)
    with _refusing(config, model.config), refusing("its examination"):
        examined = examine(model)
        if max_model_len == 0:
            raise ModelRefused("its configuration does not say how long a sequence may be (max_position_embeddings)")
        shape, text = examined.shape, model.config.get_text_config()
        if shape.dtype not in _DTYPE_NAMES:
            raise ModelRefused(f"its keys and values are {shape.dtype}, not one of {', '.join(_DTYPE_NAMES.values())}")
        fingerprint = Fingerprint(
            config_hash=_config_hash(model.config),
            weights_hash=_weights_hash(model),
            dtype=_DTYPE_NAMES[shape.dtype],
            block_size=config.engine.block_size or backend.block_size,
            num_layers=len(examined.options),
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            layout=LAYOUT_VERSION,
        )
        info = ModelInfo(
            name=config.model.served_name,
            vocab_size=text.vocab_size,
            max_model_len=max_model_len,
            eos_token_ids=eos_token_ids,
            fingerprint=fingerprint,
            hidden_size=text.hidden_size,
        )
    return LoadedModel(model, backend, info, examined.options, examined.last_attention)


@contextmanager
def _refusing(config: TandemConfig, model_config: Any) -> Iterator[None]:
    """Whose model it is that is refused inside."""
    try:
        yield
    except ModelRefused as error:
        words = f"{config.model.served_name} ({model_config.model_type}) is refused: {error.message}"
        raise ModelRefused(words, field="model.path") from error


def _max_model_len(config: TandemConfig, model_config: Any) -> int:
    with _refusing(config, model_config):
        limit = _length_limit(config.model.served_name, model_config)
    wanted = config.model.max_model_len
    if limit == 0:
        return 0
    if wanted > limit:
        raise ConfigError(
            f"model.max_model_len must be at most {limit}, as many tokens as {config.model.served_name} takes, "
            f"not {wanted}; 0: the model's own limit",
            field="model.max_model_len",
        )
    return wanted or limit


def _length_limit(name: str, config: Any) -> int:
    """0 where the configuration names none: what else speaks against the model comes first."""
    text = config.get_text_config()
    limit = max(0, int(getattr(text, "max_position_embeddings", 0) or 0))
    rope = getattr(text, "rope_parameters", None) or {}
    # Per layer type in some models.
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    if limit and any(kind.get("rope_type") == "dynamic" for kind in kinds):
        # Past it transformers turns a token by the longest sequence of its step, up to it as if nothing were scaled.
        log.info("%s takes %d tokens, up to which its rope type 'dynamic' is exact", name, limit)
    originals = [kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"]
    # Past its original length a longrope model turns every position differently, cached ones too.
    return min([limit, *(int(original) for original in originals)])


def _config_hash(model_config: Any) -> str:
    settings = {key: value for key, value in model_config.to_dict().items() if key not in _VOLATILE}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def _weights_hash(model: nn.Module) -> str:
    """Up to 256 evenly spaced elements of every parameter, hashed: enough to tell a fine-tune from its base."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        flat = parameter.detach().flatten()
        digest.update(flat[:: max(1, flat.numel() // 256)][:256].float().cpu().numpy().tobytes())
    return digest.hexdigest()
