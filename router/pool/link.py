"""The router's connection to one worker: its calls, and what their failures mean."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import grpc

from tandem import errors, rpc
from tandem.config import RouterConfig
from tandem.types import Role
from tandem.v1 import registry_pb2, worker_pb2, worker_pb2_grpc

log = logging.getLogger(__name__)

# A worker that does not acknowledge an abort for this long is left to its leases and its own loss.
ABORT_TIMEOUT_S = 2.0


class WorkerLink:
    """The channel to a worker, from its Join to its loss, and every call that the router makes on it."""

    def __init__(self, worker_id: str, address: str, config: RouterConfig) -> None:
        self._id = worker_id
        self._address = address
        self.lease_ms = round(config.lease_s * 1000)
        # Why the worker was lost; None while it is not.
        self.loss: errors.TandemError | None = None
        self._aborts: set[asyncio.Task[None]] = set()
        self._channel = rpc.make_channel(address, rpc.MAX_WORKER_MESSAGE_BYTES)
        # What they raise is translated inside `calling` or `streaming`.
        self.prefill: Any = worker_pb2_grpc.PrefillWorkerStub(self._channel)
        self.decode: Any = worker_pb2_grpc.DecodeWorkerStub(self._channel)
        self._admin: Any = worker_pb2_grpc.WorkerAdminStub(self._channel)

    async def dial(self, timeout_s: float) -> None:
        """Raises Unavailable when nobody answers at the announced address."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._channel.channel_ready()
        except TimeoutError:
            raise errors.Unavailable(f"the router cannot reach worker {self._id} at {self._address}") from None

    async def close(self) -> None:
        if self._aborts:
            await asyncio.wait(self._aborts, timeout=ABORT_TIMEOUT_S)
        await self._channel.close(None)

    # What failures mean.

    @contextlib.contextmanager
    def calling(self, role: Role) -> Iterator[None]:
        """Around calls: what gRPC raises becomes a TandemError that names the worker in its role."""
        try:
            yield
        except grpc.RpcError as error:
            raise self._explain(error, role) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self.loss is not None and task is not None and not task.cancelling():
                # Nobody cancelled this task: the call was ended by the closing of the lost worker's channel.
                raise self.lost_as(role) from None
            raise

    @contextlib.contextmanager
    def streaming(self) -> Iterator[None]:
        """Around the calls that belong to no request: what they raise is why the worker is lost."""
        try:
            yield
        except grpc.RpcError as error:
            if rpc.said_by_tandem(error):
                raise rpc.error_from_rpc(error) from None
            log.info("worker %s: its token stream broke: %s", self._id, rpc.error_from_rpc(error))
            raise errors.Unavailable("its token stream broke") from None

    def _explain(self, error: grpc.RpcError, role: Role) -> errors.TandemError:
        call: Any = error
        if rpc.said_by_tandem(error):
            return rpc.error_from_rpc(error)
        broken_off = call.code() is grpc.StatusCode.CANCELLED
        if call.code() is grpc.StatusCode.UNAVAILABLE or (broken_off and self.loss is not None):
            return errors.WorkerLost(f"{role} worker {self._id} was lost: {self.loss or call.details()}")
        if broken_off:
            # By its server's gRPC, not by its handler. As far as is known the call is over and the worker is not; if it
            # is on its way out, its registration ends next.
            log.warning("%s worker %s broke off a call", role, self._id)
            return errors.Unavailable(f"the {role} worker broke off the call; send the request again")
        if call.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return errors.DeadlineExceeded(f"the deadline passed while a {role} worker held the request")
        return rpc.error_from_rpc(error)

    def lost_as(self, role: Role) -> errors.WorkerLost:
        return errors.WorkerLost(f"{role} worker {self._id} was lost: {self.loss}")

    # Calls.

    async def renew(self, reservation_ids: Sequence[str], timeout_s: float) -> None:
        """Extends the leases of these reservations."""
        request = worker_pb2.RenewRequest(reservation_ids=reservation_ids, lease_ms=self.lease_ms)
        try:
            await self.decode.Renew(request, timeout=timeout_s)
        except grpc.RpcError as error:
            # The next round may come through before the leases end; if none does, the worker ends the requests.
            count, why = len(reservation_ids), rpc.error_from_rpc(error)
            log.warning("worker %s did not renew %d leases: %s", self._id, count, why)

    def abort(self, request_id: str, attempt: int) -> asyncio.Task[None]:
        """Starts Abort. The task ends in bounded time, never fails, and goes on when its waiter is cancelled."""
        task = asyncio.create_task(self._abort(request_id, attempt))
        self._aborts.add(task)
        task.add_done_callback(self._aborts.discard)
        return task

    async def _abort(self, request_id: str, attempt: int) -> None:
        if self.loss is not None:
            return
        message = worker_pb2.AbortRequest(request_id=request_id, attempt=attempt)
        try:
            with self.calling(Role.DECODE):
                await self.decode.Abort(message, timeout=ABORT_TIMEOUT_S)
        except errors.TandemError as error:
            log.warning("abort on worker %s failed: %s", self._id, error, extra={"request_id": request_id})

    async def check_integrity(self, timeout_s: float) -> registry_pb2.Integrity:
        """A worker that cannot answer is not ok."""
        try:
            answer: registry_pb2.Integrity = await self._admin.CheckIntegrity(
                worker_pb2.CheckIntegrityRequest(), timeout=timeout_s
            )
        except grpc.RpcError as error:
            return registry_pb2.Integrity(problem=f"no answer: {rpc.error_from_rpc(error)}")
        return answer
