"""A call of tandem.v1.KVTransfer, as the sending end of one transfer sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc

from kv_transfer.base import Source, TransferTarget
from kv_transfer.ends.tasks import note_failure
from kv_transfer.frames.codec import MAX_FRAME_BYTES, CorruptFrame, decode, frame_of
from kv_transfer.frames.messages import Data, Done, KVMessage
from kv_transfer.frames.runs import Runs
from tandem import errors, rpc

SERVICE = "tandem.v1.KVTransfer"
# What a server that hosts the service must accept.
MAX_MESSAGE_BYTES = MAX_FRAME_BYTES
# How gRPC says that a call has ended already.
_ENDED = (grpc.aio.AioRpcError, asyncio.InvalidStateError)


@dataclass(frozen=True, eq=False)
class Call:
    """The call that a transfer is to be made by, and its two ends."""

    # To the target's worker; open until the link is gone.
    channel: grpc.aio.Channel
    method: str
    source: Source
    target: TransferTarget


class CarrierLink:
    """Carries the frames of one transfer, with their payloads. Raises the receiver's error, or WorkerLost,
    DeadlineExceeded.

    A task reads the receiver's messages until it is done.
    """

    # So many frames are made, or in the making, while one leaves: bounds what a transfer has in memory.
    ahead = 1

    def __init__(self, call: Call) -> None:
        """Begins the call."""
        self._channel, self._source, self._target = call.channel, call.source, call.target
        self._peer = call.target.address
        multicallable: Any = call.channel.stream_stream(f"/{SERVICE}/{call.method}", None, None)
        self._call = multicallable(timeout=call.target.deadline_s)
        self._statuses: list[grpc.aio.AioRpcError] = []
        self._call.add_done_callback(partial(_note_status, self._statuses))
        self._answer = asyncio.create_task(self._read_answer())
        self._answer.add_done_callback(self._on_end)

    async def ready(self) -> None:
        """Returns when frames may be made: before the first, and at once ever after."""
        return

    def pack(self, sequence: int, layers: range, tokens: range, payload: Runs) -> tuple[Data, bytes]:
        """In a thread, unless it is quick: makes a frame, copying a payload into what `carry` takes."""
        return frame_of(sequence, layers, tokens, payload)

    async def carry(self, data: Data, packed: bytes) -> None:
        """Sends a data frame. Returns when there is room for the next one."""
        await self.write(packed)

    async def write(self, frame: bytes) -> None:
        """Sends any other frame."""
        with self._own_cancels_only():
            try:
                await self._call.write(frame)
            except _ENDED:
                # The receiver ended the call; the answer says why.
                await self._answer
                raise errors.TransferFailed(f"the worker at {self._peer} ended the transfer early") from None

    def rest(self) -> None:
        """No thread makes a frame, now or later. Called before the seal, and at any other end; perhaps twice."""
        return

    async def finish(self) -> Done:
        """Says that no frame follows; returns the receiver's answer."""
        with self._own_cancels_only():
            with suppress(*_ENDED):  # the answer says why, as in write
                await self._call.done_writing()
            return await self._answer

    @property
    def heard_corrupt(self) -> bool:
        """Whether the receiver's answer is not as it was sent."""
        answer = self._answer
        return answer.done() and not answer.cancelled() and isinstance(answer.exception(), CorruptFrame)

    def close(self) -> None:
        """Tells the receiver that no seal comes; nothing happens when the call has ended."""
        self._call.cancel()
        self._answer.cancel()

    async def gone(self) -> None:
        """After close, when no thread makes a frame any more: what must end before the transfer's context is left."""
        return

    def _note(self, message: KVMessage, payload: memoryview) -> None:
        """What the receiver said before it is done."""
        raise errors.TransferFailed(f"the worker at {self._peer} answered a frame with {type(message).__name__}")

    def _on_end(self, answer: asyncio.Task[Done]) -> None:
        note_failure(answer)

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
