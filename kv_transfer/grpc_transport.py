"""Transport `grpc`: frames are the raw messages of one client stream, tandem.v1.KVTransfer/Push, without protobuf.

The receiving side is a handler for the worker's own server, made with `make_server(MAX_MESSAGE_BYTES)`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import Any

import grpc

from kv_transfer.admission import Admission, Claims
from kv_transfer.base import Counters, Landings, Sender, Source, Target
from kv_transfer.channels import Channels
from kv_transfer.codec import MAX_FRAME_BYTES, Done, decode, encode
from kv_transfer.receiver import Receiver
from kv_transfer.sender import FrameSender, check_source
from kv_transfer.threads import copy_threads
from tandem import errors
from tandem.config import TandemConfig
from tandem.rpc import error_from_rpc

SERVICE, METHOD = "tandem.v1.KVTransfer", "Push"
# What a server that hosts the service must accept.
MAX_MESSAGE_BYTES = MAX_FRAME_BYTES
# How gRPC says that a call has ended already.
_ENDED = (grpc.aio.AioRpcError, asyncio.InvalidStateError)


class KVService(grpc.GenericRpcHandler):  # type: ignore[misc,type-arg,unused-ignore]
    """Receives transfers, on a server that has tandem.rpc.ErrorInterceptor.

    For `server.add_generic_rpc_handlers((service,))`; close it after the server has stopped.
    """

    def __init__(self, landings: Landings, config: TandemConfig, claims: Claims | None = None) -> None:
        self.counters = Counters()
        self._admission = Admission(landings, claims)
        self._frames_in_flight = config.worker.frames_in_flight
        self._threads = copy_threads("kv-receive")
        push = grpc.stream_unary_rpc_method_handler(self._push)
        self._handler = grpc.method_handlers_generic_handler(SERVICE, {METHOD: push})

    def service(self, handler_call_details: Any) -> Any:
        """See grpc.GenericRpcHandler."""
        return self._handler.service(handler_call_details)

    def close(self) -> None:
        """Ends the threads. Transfers must have ended before: stop the server first."""
        self._threads.shutdown()

    async def _push(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        def lost() -> errors.TandemError:
            remaining = context.time_remaining()
            if remaining is not None and remaining <= 0:
                return errors.DeadlineExceeded("the deadline passed before the KV had come")
            return errors.TransferFailed("the sender left before the seal")

        receiver = Receiver(self._admission, self._threads, self._frames_in_flight, self.counters)
        return encode(await receiver.receive(aiter(requests), lost))


class GrpcTransport:
    """Sends over one channel a peer, kept for the next transfer."""

    name = "grpc"

    def __init__(self, config: TandemConfig) -> None:
        self.counters = Counters()
        self._frame_bytes = config.worker.frame_bytes
        self._threads = copy_threads("kv-send")
        self._channels = Channels(MAX_MESSAGE_BYTES)

    @asynccontextmanager
    async def open(self, source: Source, target: Target) -> AsyncIterator[Sender]:
        """See Transport."""
        check_source(source, target)
        async with self._channels.use(target.address) as channel:
            link = _GrpcLink(channel, target)
            sender = FrameSender(source, target, link, self._frame_bytes, self._threads, self.counters)
            try:
                await sender.open()
                yield sender
            finally:
                link.cancel()
                await sender.close()

    async def aclose(self) -> None:
        """See Transport. Channels and threads are gone on return."""
        await self._channels.aclose()
        self._threads.shutdown()


class _GrpcLink:
    """One call of Push."""

    def __init__(self, channel: Any, target: Target) -> None:
        self._peer = target.address
        self._call: Any = channel.stream_unary(f"/{SERVICE}/{METHOD}")(timeout=target.deadline_s)
        self._statuses: list[grpc.aio.AioRpcError] = []
        self._call.add_done_callback(partial(_note_status, self._statuses))

    async def write(self, frame: bytes) -> None:
        """See Link."""
        with self._own_cancels_only():
            try:
                await self._call.write(frame)
            except _ENDED:
                # The receiver ended the call; the answer says why.
                await self._answer()
                raise errors.TransferFailed(f"the worker at {self._peer} ended the transfer early") from None

    async def finish(self) -> Done:
        """See Link."""
        with self._own_cancels_only():
            with suppress(*_ENDED):  # the answer says why, as in write
                await self._call.done_writing()
            message, _ = decode(await self._answer())
        if not isinstance(message, Done):
            raise errors.TransferFailed(f"the worker at {self._peer} gave no answer to the seal")
        return message

    def cancel(self) -> None:
        """Tells the receiver that no seal comes; nothing happens when the call has ended."""
        self._call.cancel()

    @contextmanager
    def _own_cancels_only(self) -> Iterator[None]:
        """gRPC raises CancelledError when the channel is closed; only a cancel of the task itself may look like one."""
        try:
            yield
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise errors.TransferFailed(f"the transport to {self._peer} was closed in mid-transfer") from None

    async def _answer(self) -> bytes:
        try:
            answer: bytes = await self._call
        except grpc.aio.AioRpcError as error:
            raise self._translate(_true_status(self._statuses, error)) from None
        return answer

    def _translate(self, failure: grpc.aio.AioRpcError) -> errors.TandemError:
        error = error_from_rpc(failure)
        if type(error) is errors.Unavailable or type(error) is errors.Cancelled:
            return errors.WorkerLost(f"the worker at {self._peer} is gone: {error.message}")
        if type(error) in (errors.InternalError, errors.Overloaded):
            return errors.TransferFailed(f"the transfer to {self._peer} broke: {error.message}")
        return error


# In gRPC's asyncio client a write that fails because the server has ended the call replaces the server's status by
# INTERNAL (grpc/grpc#36066), before or after the true one is known. So each status is noted as it is set.


def _note_status(statuses: list[grpc.aio.AioRpcError], call: Any) -> None:
    code, details = _at_once(call.code()), _at_once(call.details())
    trailing = _at_once(call.trailing_metadata())
    statuses.append(grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details, None))


def _at_once(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that has nothing to wait for."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("the call has no status yet")


def _true_status(statuses: list[grpc.aio.AioRpcError], last: grpc.aio.AioRpcError) -> grpc.aio.AioRpcError:
    """The server's: a bare INTERNAL is the guess, ours carry metadata."""
    said = (
        status for status in statuses if status.code() is not grpc.StatusCode.INTERNAL or status.trailing_metadata()
    )
    return next(said, last)
