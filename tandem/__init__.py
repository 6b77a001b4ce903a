"""Tandem serves language models with prefill and decode split across two pools of workers.

This package exports the SDK: `tandem.Client`, `tandem.AsyncClient`, `tandem.SamplingParams`, the events they yield
and the errors they raise. It imports neither torch nor transformers nor ray; names resolve on first use, so that a
worker's engine, which lives below the same package, does not import gRPC through it either.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tandem.client import (
        AsyncClient,
        AsyncGeneration,
        Choice,
        Client,
        Completion,
        Embeddings,
        Generation,
        ServiceStatus,
    )
    from tandem.errors import (
        Cancelled,
        ConfigError,
        DeadlineExceeded,
        InternalError,
        InvalidRequest,
        ModelNotFound,
        ModelRefused,
        Overloaded,
        Refused,
        TandemError,
        TransferFailed,
        Unavailable,
        WorkerLost,
    )
    from tandem.timeline import Phase, Timeline
    from tandem.types import (
        Accepted,
        ChoiceFinished,
        Completed,
        Delta,
        Event,
        FinishReason,
        ModelInfo,
        Pooling,
        RequestReport,
        SamplingParams,
        Token,
        Usage,
    )

    __version__: str

# Where the names below are looked for; the client's last, for it imports gRPC.
_HOMES = ("tandem.errors", "tandem.timeline", "tandem.types", "tandem.client")

__all__ = [
    "Accepted",
    "AsyncClient",
    "AsyncGeneration",
    "Cancelled",
    "Choice",
    "ChoiceFinished",
    "Client",
    "Completed",
    "Completion",
    "ConfigError",
    "DeadlineExceeded",
    "Delta",
    "Embeddings",
    "Event",
    "FinishReason",
    "Generation",
    "InternalError",
    "InvalidRequest",
    "ModelInfo",
    "ModelNotFound",
    "ModelRefused",
    "Overloaded",
    "Phase",
    "Pooling",
    "Refused",
    "RequestReport",
    "SamplingParams",
    "ServiceStatus",
    "TandemError",
    "Timeline",
    "Token",
    "TransferFailed",
    "Unavailable",
    "Usage",
    "WorkerLost",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    modules = map(importlib.import_module, _HOMES if name in __all__ else ())
    home = next((module for module in modules if hasattr(module, name)), None)
    if home is None:
        raise AttributeError(f"module 'tandem' has no attribute {name!r}")
    return getattr(home, name)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("tandem")
    except PackageNotFoundError:
        return "0+uninstalled"  # imported from a checkout that nobody installed
