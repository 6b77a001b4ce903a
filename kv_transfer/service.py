"""The receiving side's gRPC handlers: tandem.v1.KVTransfer, frames as raw messages, without protobuf."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import grpc

from kv_transfer.admission import Admission, Claims
from kv_transfer.base import Counters, Landings
from kv_transfer.codec import MAX_FRAME_BYTES, decode
from kv_transfer.fences import Fences
from kv_transfer.mapped import MappedIntake
from kv_transfer.messages import Data, Placed, Released, Taken
from kv_transfer.nixl_intake import Doors, NixlIntake
from kv_transfer.plasma import Plasma
from kv_transfer.receiver import Copied, Intake, Receiver, tell
from kv_transfer.shared_memory import SharedMemory
from kv_transfer.threads import copy_threads, end
from tandem import errors
from tandem.config import TandemConfig

SERVICE = "tandem.v1.KVTransfer"
# The method of each transport: they differ in whether a data frame brings its payload, the payload's place, or word of
# what its sender has written.
METHODS = {"grpc": "Push", "ray": "PushPlaced", "shm": "PushMapped", "nixl": "PushLent"}
# By it a writer by NIXL says that it writes no more.
RELEASE = "Release"
# What a server that hosts the service must accept.
MAX_MESSAGE_BYTES = MAX_FRAME_BYTES
# A thread that waits for an object costs nothing, and those of a sender that is gone wait on for a while.
_TAKE_THREADS = 16


class KVService(grpc.GenericRpcHandler):  # type: ignore[misc,type-arg,unused-ignore]
    """Receives transfers, on a server that has tandem.rpc.ErrorInterceptor.

    For `server.add_generic_rpc_handlers((service,))`; `aclose` it after the server has stopped.
    """

    def __init__(
        self,
        landings: Landings,
        config: TandemConfig,
        claims: Claims | None = None,
        plasma: Plasma | None = None,
        memory: SharedMemory | None = None,
    ) -> None:
        """plasma: takes transfers through Ray's object store too. memory: the pool lies there, and others may write."""
        # By transport.
        self.counters = {"grpc": Counters()}
        self._admission = Admission(landings, claims)
        self._frames_in_flight = config.worker.frames_in_flight
        self._fences = Fences()
        self._threads = copy_threads("kv-receive")
        self._take_threads = ThreadPoolExecutor(_TAKE_THREADS, thread_name_prefix="kv-take")
        methods = {METHODS["grpc"]: grpc.stream_stream_rpc_method_handler(self._push)}
        if plasma is not None:
            self._plasma = plasma
            self.counters["ray"] = Counters()
            methods[METHODS["ray"]] = grpc.stream_stream_rpc_method_handler(self._push_placed)
        if memory is not None:
            self._memory = memory
            self.counters["shm"] = Counters()
            methods[METHODS["shm"]] = grpc.stream_stream_rpc_method_handler(self._push_mapped)
        self._doors: Doors | None = None
        if config.worker.nixl_devices:
            self._doors = Doors(config.worker.nixl_devices)
            self.counters["nixl"] = Counters()
            methods[METHODS["nixl"]] = grpc.stream_stream_rpc_method_handler(self._push_lent)
            methods[RELEASE] = grpc.unary_unary_rpc_method_handler(self._release)
        self._handler = grpc.method_handlers_generic_handler(SERVICE, methods)

    def service(self, handler_call_details: Any) -> Any:
        """See grpc.GenericRpcHandler."""
        return self._handler.service(handler_call_details)

    async def aclose(self) -> None:
        """Ends the threads. Transfers must have ended before: stop the server first."""
        self._fences.close()
        if self._doors is not None:
            await self._doors.aclose()
        await end(self._threads)
        await end(self._take_threads)

    async def _push(self, requests: AsyncIterator[bytes], context: Any) -> None:
        await self._receive("grpc", Copied(), requests, context)

    async def _push_placed(self, requests: AsyncIterator[bytes], context: Any) -> None:
        await self._receive("ray", _FromPlasma(self._plasma, self._take_threads, context), requests, context)

    async def _push_mapped(self, requests: AsyncIterator[bytes], context: Any) -> None:
        await self._receive("shm", MappedIntake(self._memory, self._fences, context), requests, context)

    async def _push_lent(self, requests: AsyncIterator[bytes], context: Any) -> None:
        assert self._doors is not None
        await self._receive("nixl", NixlIntake(self._doors, context), requests, context)

    async def _release(self, request: bytes, _context: Any) -> bytes:
        assert self._doors is not None
        message, _ = decode(request)
        if not isinstance(message, Released):
            raise errors.TransferFailed("a release is a frame of kind released")
        self._doors.release(message.reservation_id)
        return b""

    async def _receive(self, transport: str, intake: Intake, requests: AsyncIterator[bytes], context: Any) -> None:
        def lost() -> errors.TandemError:
            remaining = context.time_remaining()
            if remaining is not None and remaining <= 0:
                return errors.DeadlineExceeded("the deadline passed before the KV had come")
            return errors.TransferFailed("the sender left before the seal")

        counters = self.counters[transport]
        receiver = Receiver(self._admission, self._threads, self._frames_in_flight, counters, intake)
        await tell(context, await receiver.receive(aiter(requests), lost))


class _FromPlasma(Copied):
    """Of one transfer: payloads are objects in Ray's store, and each is acknowledged."""

    kind: type[Data] = Placed

    def __init__(self, plasma: Plasma, threads: ThreadPoolExecutor, context: Any) -> None:
        self._plasma = plasma
        self._threads = threads
        self._context = context
        # gRPC takes one write at a time.
        self._writing = asyncio.Lock()

    async def fetch(self, data: Data, payload: memoryview) -> memoryview:
        """See Intake. A cancel does not wait for the thread: it writes nowhere."""
        assert isinstance(data, Placed)
        unwanted = Event()
        try:
            loop = asyncio.get_running_loop()
            take = self._plasma.take
            return await loop.run_in_executor(self._threads, take, data.place, data.payload_bytes, unwanted)
        finally:
            unwanted.set()

    async def taken(self, data: Data) -> None:
        """See Intake."""
        async with self._writing:
            await tell(self._context, Taken(data.sequence))
