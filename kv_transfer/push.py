"""The sending side of tandem.v1.KVTransfer: a call of it is the link of one transfer, and a transport makes them."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import Any

import grpc

from kv_transfer.base import Counters, Sender, Source, Target
from kv_transfer.channels import Channels
from kv_transfer.codec import CorruptFrame, decode
from kv_transfer.messages import Data, Done, Message
from kv_transfer.runs import Runs
from kv_transfer.sender import FrameSender, check_source
from kv_transfer.service import MAX_MESSAGE_BYTES, METHODS, SERVICE
from kv_transfer.threads import copy_threads, end
from kv_transfer.wire_dtype import wire_dtype
from tandem import errors, rpc

# How gRPC says that a call has ended already.
_ENDED = (grpc.aio.AioRpcError, asyncio.InvalidStateError)


class PushTransport(ABC):
    """Sends over one channel a peer, kept for the next transfer."""

    # Of METHODS.
    name: str

    def __init__(self, frame_bytes: int, wire_dtype: str) -> None:
        """wire_dtype: in which it sends, of WIRE_DTYPES."""
        self.counters = Counters()
        self._frame_bytes = frame_bytes
        self._wire_dtype = wire_dtype
        self._threads = copy_threads("kv-send")
        self._channels = Channels(MAX_MESSAGE_BYTES)

    @asynccontextmanager
    async def open(self, source: Source, target: Target) -> AsyncIterator[Sender]:
        """See Transport."""
        check_source(source, target)
        async with self._channels.use(target.address) as channel:
            wire = wire_dtype(self._wire_dtype, source.layout)
            link = self._link(self._call(channel, target.deadline_s), source, target)
            sender = FrameSender(source, target, link, wire, self._frame_bytes, self._threads, self.counters)
            try:
                await sender.open()
                yield sender
            finally:
                self.counters.corrupt_frames += link.heard_corrupt
                link.close()
                try:
                    await sender.close()
                finally:
                    await link.gone()

    async def aclose(self) -> None:
        """See Transport. Channels and threads are gone on return."""
        await self._channels.aclose()
        await end(self._threads)

    def _call(self, channel: Any, deadline_s: float | None) -> Any:
        return channel.stream_stream(f"/{SERVICE}/{METHODS[self.name]}")(timeout=deadline_s)

    @abstractmethod
    def _link(self, call: Any, source: Source, target: Target) -> PushLink: ...


class PushLink(ABC):
    """The Link of one call. A task reads the receiver's messages until it is done."""

    # Bounds what a transfer has in memory.
    ahead = 1

    def __init__(self, call: Any, peer: str) -> None:
        self._call = call
        self._peer = peer
        self._statuses: list[grpc.aio.AioRpcError] = []
        call.add_done_callback(partial(_note_status, self._statuses))
        self._answer = asyncio.create_task(self._read_answer())
        self._answer.add_done_callback(self._on_end)

    async def ready(self) -> None:
        """See Link. Nothing is waited for."""
        return

    @abstractmethod
    def pack(self, sequence: int, layers: range, tokens: range, payload: Runs) -> tuple[Data, bytes]:
        """See Link."""

    @abstractmethod
    async def carry(self, data: Data, packed: bytes) -> None:
        """See Link."""

    async def write(self, frame: bytes) -> None:
        """See Link."""
        with self._own_cancels_only():
            try:
                await self._call.write(frame)
            except _ENDED:
                # The receiver ended the call; the answer says why.
                await self._answer
                raise errors.TransferFailed(f"the worker at {self._peer} ended the transfer early") from None

    async def finish(self) -> Done:
        """See Link."""
        with self._own_cancels_only():
            with suppress(*_ENDED):  # the answer says why, as in write
                await self._call.done_writing()
            return await self._answer

    @property
    def heard_corrupt(self) -> bool:
        """Whether the receiver's answer is not as it was sent."""
        answer = self._answer
        return answer.done() and not answer.cancelled() and isinstance(answer.exception(), CorruptFrame)

    def rest(self) -> None:
        """See Link. Nothing is held."""
        return

    def close(self) -> None:
        """Tells the receiver that no seal comes; nothing happens when the call has ended."""
        self._call.cancel()
        self._answer.cancel()

    async def gone(self) -> None:
        """After close, when no thread makes a frame any more: what must end before the transfer's context is left."""
        return

    def _note(self, message: Message, payload: memoryview) -> None:
        """What the receiver said before it is done."""
        raise errors.TransferFailed(f"the worker at {self._peer} answered a frame with {type(message).__name__}")

    def _on_end(self, answer: asyncio.Task[Done]) -> None:
        if not answer.cancelled():
            answer.exception()  # seen: whoever needs the answer gets it raised, and perhaps nobody does

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

    async def _read_answer(self) -> Done:
        with self._own_cancels_only():
            try:
                while (frame := await rpc.read(self._call)) is not None:
                    message, payload = decode(frame)
                    if isinstance(message, Done):
                        return message
                    self._note(message, payload)
            except grpc.aio.AioRpcError as error:
                raise self._translate(_true_status(self._statuses, error)) from None
        raise errors.TransferFailed(f"the worker at {self._peer} gave no answer to the seal")

    def _translate(self, failure: grpc.aio.AioRpcError) -> errors.TandemError:
        error = rpc.error_from_rpc(failure)
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
