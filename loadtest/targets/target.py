"""What load is sent to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from loadtest.metrics import Outcome
from loadtest.schedule.workloads import LoadRequest


@dataclass(frozen=True)
class Served:
    """What a target says of the model that it serves; None where it does not say."""

    model: str
    vocab_size: int | None = None
    # Prompt and output together, tokens.
    max_model_len: int | None = None


@dataclass(frozen=True)
class SendOptions:
    # The model to name in requests; empty: the one that is served, the first of several.
    model: str = ""
    # Generate every token that is asked for, past the end of sequence.
    ignore_eos: bool = True
    temperature: float = 0.0
    # Seconds that an answer may take from its sending on.
    timeout_s: float = 600.0
    # Prefix caches serve only requests of the same salt; not OpenAI's own: vLLM and Tandem know it.
    cache_salt: str = ""


class LoadTarget(Protocol):
    # As `vllm bench serve` names its backends.
    backend: str

    async def describe(self) -> Served:
        """Asks what is served. Raises TandemError when nobody answers, or not as it should."""

    async def send_request(self, request: LoadRequest, outcome: Outcome) -> None:
        """One request, to its end: fills in the outcome, failures included. Raises nothing but CancelledError."""

    async def close(self) -> None: ...
