"""One decode worker spoken to directly, by somebody who plays its router and its prefill worker."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc

from kv_transfer.carriers.table import carrier_class
from kv_transfer.ends.link import MAX_MESSAGE_BYTES, SERVICE
from kv_transfer.frames.codec import chain_checksum, decode, encode, frame_of
from kv_transfer.frames.layout import KVLayout
from kv_transfer.frames.messages import Data, Done, Open, Seal
from kv_transfer.frames.runs import Runs
from tandem import rpc, wire
from tandem.client.status import WorkerState
from tandem.types import EngineRequest, SamplingParams
from tandem.v1 import worker_pb2, worker_pb2_grpc

TIMEOUT_S = 10.0


@contextmanager
def typed_errors() -> Iterator[None]:
    """What gRPC raises becomes the TandemError that the worker meant."""
    try:
        yield
    except grpc.RpcError as error:
        raise rpc.error_from_rpc(error) from None


class DirectRouter:
    """Reserves under a subscription of its own, whose end frees everything."""

    def __init__(self, worker: WorkerState) -> None:
        self.worker = worker
        self.id = f"direct-{os.urandom(8).hex()}"
        options = rpc.client_options(2 * MAX_MESSAGE_BYTES)
        self._channel = grpc.insecure_channel(worker.address, options=options)
        self._stub: Any = worker_pb2_grpc.DecodeWorkerStub(self._channel)
        self.tokens: Any = self._stub.Subscribe(worker_pb2.SubscribeRequest(subscriber_id=self.id))
        self.tokens.initial_metadata()

    def __enter__(self) -> DirectRouter:
        return self

    def __exit__(self, *_: object) -> None:
        self.tokens.cancel()
        self._channel.close()

    def name(self, request_id: str) -> str:
        """Of this router alone: a worker remembers for a while what was aborted."""
        return f"{request_id}-{self.id}"

    def request(
        self,
        request_id: str,
        attempt: int = 0,
        prompt_tokens: int = 40,
        max_tokens: int = 8,
        lease_ms: int = 60_000,
        transport: str = "grpc",
        deadline_ms: int = 0,
    ) -> worker_pb2.ReserveRequest:
        request = EngineRequest(
            request_id=self.name(request_id),
            prompt_ids=tuple(3 + byte for byte in os.urandom(prompt_tokens)),
            sampling=SamplingParams(max_tokens=max_tokens, ignore_eos=True),
            attempt=attempt,
        )
        return worker_pb2.ReserveRequest(
            request=wire.request_to_wire(request),
            subscriber_id=self.id,
            lease_ms=lease_ms,
            transport=transport,
            deadline_ms=deadline_ms,
        )

    def reserve(self, request: worker_pb2.ReserveRequest) -> worker_pb2.Reservation:
        with typed_errors():
            reservation: worker_pb2.Reservation = self._stub.Reserve(request, timeout=TIMEOUT_S)
            return reservation

    def reserve_later(self, request: worker_pb2.ReserveRequest) -> Any:
        """The call under way; its result() raises grpc.RpcError."""
        return self._stub.Reserve.future(request, timeout=TIMEOUT_S)

    def abort(self, request_id: str, attempt: int) -> None:
        self.abort_named(self.name(request_id), attempt)

    def abort_named(self, name: str, attempt: int) -> None:
        """Of whatever router."""
        with typed_errors():
            self._stub.Abort(worker_pb2.AbortRequest(request_id=name, attempt=attempt), timeout=TIMEOUT_S)

    def renew(self, reservation: worker_pb2.Reservation, lease_ms: int) -> None:
        with typed_errors():
            message = worker_pb2.RenewRequest(reservation_ids=[reservation.reservation_id], lease_ms=lease_ms)
            self._stub.Renew(message, timeout=TIMEOUT_S)

    def push(self, frames: Sequence[bytes]) -> Done:
        """Frames as they are, from a sender with no manners."""
        with typed_errors():
            done, _ = decode(self._channel.stream_unary("/tandem.v1.KVTransfer/Push")(iter(frames), timeout=TIMEOUT_S))
        assert isinstance(done, Done)
        return done

    def fall_silent(self, transport: str, frames: Sequence[bytes]) -> None:
        """Says these frames and no more, and hears until the call ends."""
        over = threading.Event()

        def say() -> Iterator[bytes]:
            yield from frames
            over.wait(TIMEOUT_S)

        call = self._channel.stream_stream(f"/{SERVICE}/{carrier_class(transport).method}")(say(), timeout=TIMEOUT_S)
        call.add_done_callback(lambda _: over.set())
        with typed_errors():
            for _ in call:
                pass

    def frames(self, request: worker_pb2.ReserveRequest, reservation: worker_pb2.Reservation) -> list[bytes]:
        """A whole transfer of noise for the reservation: open, a data frame for each layer, seal."""
        fingerprint = self.worker.model.fingerprint
        layout = KVLayout.of(fingerprint)
        tokens = range(reservation.cached_tokens, len(request.request.prompt_ids))
        opening = Open(
            reservation_id=reservation.reservation_id,
            request_id=request.request.request_id,
            attempt=request.request.attempt,
            fingerprint=fingerprint,
            token_start=tokens.start,
            token_stop=tokens.stop,
            wire_dtype="native",
        )
        data: list[tuple[Data, bytes]] = []
        for layer in range(layout.num_layers):
            # Small numbers in any dtype: no infinity, no NaN.
            payload = bytes(byte & 0x0F for byte in os.urandom(layout.payload_bytes(1, len(tokens))))
            data.append(frame_of(layer, range(layer, layer + 1), tokens, Runs.of(payload)))
        checksum = 0
        for header, _ in data:
            checksum = chain_checksum(checksum, header)
        total = sum(header.payload_bytes for header, _ in data)
        return [encode(opening), *(frame for _, frame in data), encode(Seal(5, len(data), total, checksum))]

    def last_tokens(self) -> worker_pb2.RequestTokens:
        """What the worker tells of a request at its end."""
        return next(message for batch in self.tokens for message in batch.requests if message.finish_reason)
