"""Transport `grpc`: a data frame brings its payload."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kv_transfer.codec import Data, encode
from kv_transfer.push import PushLink, PushTransport
from tandem.config import TandemConfig


class GrpcTransport(PushTransport):
    name = "grpc"

    def __init__(self, config: TandemConfig) -> None:
        super().__init__(config.worker.frame_bytes)

    def _link(self, call: Any, peer: str) -> PushLink:
        return _GrpcLink(call, peer)


class _GrpcLink(PushLink):
    def pack(self, data: Data, payload: Sequence[memoryview]) -> bytes:
        """See Link."""
        return encode(data, payload)

    async def carry(self, data: Data, packed: bytes) -> None:
        """See Link."""
        await self.write(packed)
