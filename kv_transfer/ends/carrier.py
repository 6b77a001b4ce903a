"""A way for KV to travel: what differs between carriers. Everything else of both ends is the same for all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from kv_transfer.base import Source, TransferTarget
from kv_transfer.ends.link import Call, CarrierLink
from kv_transfer.ends.receiver import Intake
from tandem.config import WorkerConfig
from tandem.v1 import registry_pb2


@dataclass
class PoolMemory:
    """The memory of a worker's KV pool, before there is one."""

    # "cpu" or "cuda".
    device: str
    # KV of others comes into it: the worker can decode.
    receives: bool = True
    # Gives it for as long as the buffer lives, if a carrier needs memory of its own kind; None: torch does.
    allocate: Callable[[int], memoryview] | None = None


class Carrier(ABC):
    """Both ends of it in one process; a worker that plays one role uses one. Made before the model is loaded.

    Frames bring their payloads, unless a carrier has a CarrierLink and an Intake of its own.
    """

    # In configuration, metrics and reports.
    name: ClassVar[str]
    # The call of tandem.v1.KVTransfer that its frames travel in.
    method: ClassVar[str]

    def __init__(self, worker: WorkerConfig) -> None:
        # Frames are cut to about this many bytes of payload, in numbers of this wire dtype.
        self.frame_bytes = worker.frame_bytes
        self.wire_dtype: str = worker.wire_dtype

    @classmethod
    def make(cls, worker: WorkerConfig, memory: PoolMemory) -> Self | None:
        """None where this machine, or its configuration, cannot. Raises ConfigError for what cannot be meant."""
        return cls(worker)

    @abstractmethod
    def announcement(self) -> registry_pb2.Transport:
        """Who can use it together, and how good it is then (see the message)."""

    def link(self, call: Call) -> CarrierLink:
        """The sending end of one transfer."""
        return CarrierLink(call)

    def intake(self, context: Any) -> Intake:
        """The receiving end of one transfer, in the call that this is the context of."""
        return Intake()

    async def check_room(self, source: Source, target: TransferTarget) -> None:
        """Before a transfer begins. Raises TransferFailed when it would find no room."""
        return

    def other_calls(self) -> Mapping[str, Callable[[bytes], bytes]]:
        """Calls of tandem.v1.KVTransfer besides `method` that a receiver answers, each of one message."""
        return {}

    async def aclose(self) -> None:
        """No transfer is open any more. Twice is once."""
        return
