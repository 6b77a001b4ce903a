"""What a Reserve call asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tandem.types import EngineRequest


@dataclass(frozen=True)
class Order:
    request: EngineRequest
    # Of the prompt's full blocks (Engine.name_blocks).
    block_names: Sequence[bytes]
    # The subscription that the tokens go to.
    subscriber_id: str
    # This worker computes the prompt, straight into the reserved blocks; else the KV comes in a transfer.
    local: bool
    # Until the first renewal.
    lease_s: float
    # On the event loop's clock; None: the request has none.
    deadline: float | None
