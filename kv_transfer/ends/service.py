"""The receiving side's gRPC handlers: tandem.v1.KVTransfer, frames as raw messages, without protobuf."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any

import grpc

from kv_transfer.base import Counters, IncomingTransfers
from kv_transfer.ends.admission import TransferAdmission
from kv_transfer.ends.carrier import Carrier
from kv_transfer.ends.link import SERVICE
from kv_transfer.ends.receiver import Receiver, reply
from kv_transfer.ends.tasks import copy_threads, end
from tandem import errors
from tandem.config import TandemConfig


class KVService(grpc.GenericRpcHandler):  # type: ignore[misc,type-arg,unused-ignore]
    """Receives transfers, on a server that has tandem.rpc.ErrorInterceptor.

    For `server.add_generic_rpc_handlers((service,))`; `aclose` it after the server has stopped.
    """

    def __init__(
        self,
        transfers: IncomingTransfers,
        config: TandemConfig,
        carriers: Sequence[Carrier],
    ) -> None:
        # By carrier.
        self.counters = {carrier.name: Counters() for carrier in carriers}
        self._carriers = carriers
        self._admission = TransferAdmission(transfers)
        self._frames_in_flight = config.worker.frames_in_flight
        # Copy KV.
        self.threads = copy_threads("kv-receive")
        methods = {}
        for carrier in carriers:
            methods[carrier.method] = grpc.stream_stream_rpc_method_handler(partial(self._receive, carrier))
            for name, answer in carrier.other_calls().items():
                methods[name] = grpc.unary_unary_rpc_method_handler(partial(_answer, answer))
        self._handler = grpc.method_handlers_generic_handler(SERVICE, methods)

    def service(self, handler_call_details: Any) -> Any:
        """See grpc.GenericRpcHandler."""
        return self._handler.service(handler_call_details)

    async def aclose(self) -> None:
        """Ends the threads and the carriers. Transfers must have ended before: stop the server first."""
        for carrier in self._carriers:
            await carrier.aclose()
        await end(self.threads)

    async def _receive(self, carrier: Carrier, requests: AsyncIterator[bytes], context: Any) -> None:
        def lost() -> errors.TandemError:
            remaining = context.time_remaining()
            if remaining is not None and remaining <= 0:
                return errors.DeadlineExceeded("the deadline passed before the KV had come")
            return errors.TransferFailed("the sender left before the seal")

        counters, intake = self.counters[carrier.name], carrier.intake(context)
        receiver = Receiver(self._admission, self.threads, self._frames_in_flight, counters, intake)
        await reply(context, await receiver.receive(aiter(requests), lost))


async def _answer(answer: Callable[[bytes], bytes], request: bytes, _context: Any) -> bytes:
    return answer(request)
