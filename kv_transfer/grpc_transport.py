"""Transport `grpc`: a data frame brings its payload."""

from __future__ import annotations

from typing import Any

from kv_transfer.base import Source, Target
from kv_transfer.codec import frame_of
from kv_transfer.messages import Data
from kv_transfer.push import PushLink, PushTransport
from kv_transfer.runs import Runs
from tandem.config import TandemConfig


class GrpcTransport(PushTransport):
    name = "grpc"

    def __init__(self, config: TandemConfig) -> None:
        super().__init__(config.worker.frame_bytes, config.worker.wire_dtype)

    def _link(self, call: Any, source: Source, target: Target) -> PushLink:
        return _GrpcLink(call, target.address)


class _GrpcLink(PushLink):
    def pack(self, sequence: int, layers: range, tokens: range, payload: Runs) -> tuple[Data, bytes]:
        """See Link."""
        return frame_of(sequence, layers, tokens, payload)

    async def carry(self, data: Data, packed: bytes) -> None:
        """See Link."""
        await self.write(packed)
