"""What one prompt or attempt has on a worker: scopes that enter it into the worker's books, and take it back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Self

from router.pool.books import OnLoss
from router.pool.worker import Worker
from tandem import rpc, wire
from tandem.types import EngineRequest, Role
from tandem.v1 import worker_pb2


class PrefillHold:
    """A prompt on a prefill worker: `with` enters it, and takes everything back.

    queued ──the worker has taken it──▶ counted by heartbeats ──its result: computed──▶ over
      └── left, in whatever way: the call is cancelled, and the worker may be dismissed ──▶ over
    """

    def __init__(self, worker: Worker, key: str, tokens: int, block_names: Sequence[bytes], on_loss: OnLoss) -> None:
        """tokens: to compute. block_names: of the prompt's full blocks."""
        self._worker, self._books = worker, worker.books
        self._key = key
        self._tokens = tokens
        self._block_names = block_names
        self._on_loss = on_loss
        self._call: Any = None

    def __enter__(self) -> Self:
        self._books.queued.place(self._key, self._tokens)
        self._books.prefill_pace.sent(self._key, self._tokens)
        self._worker.attach(self._key, Role.PREFILL, self._on_loss)
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()
        self._books.queued.drop(self._key)
        self._books.prefill_pace.dropped(self._key)
        self._worker.detach(self._key, Role.PREFILL)

    def cancel(self) -> None:
        """Whoever waits for the call gets asyncio.CancelledError, or WorkerLost if the worker was lost."""
        if self._call is not None:
            self._call.cancel()

    async def start_prefill(self, message: worker_pb2.PrefillRequest, timeout_s: float) -> None:
        """Returns when the worker has the prompt in its queue, or the call has ended. Raises a TandemError."""
        self._call = self._worker.link.prefill.Prefill(message, timeout=timeout_s)
        with self._worker.link.calling(Role.PREFILL):
            await self._taken()

    async def next_event(self) -> worker_pb2.PrefillEvent | None:
        """None at the call's end. Raises the TandemError that ended it."""
        with self._worker.link.calling(Role.PREFILL):
            event: worker_pb2.PrefillEvent | None = await rpc.read(self._call)
            return event

    async def embed(self, message: worker_pb2.EmbedPromptRequest, timeout_s: float) -> worker_pb2.EmbedPromptResponse:
        """Raises a TandemError."""
        self._call = self._worker.link.prefill.Embed(message, timeout=timeout_s)
        with self._worker.link.calling(Role.PREFILL):
            await self._taken()
            answer: worker_pb2.EmbedPromptResponse = await self._call
        self.computed()
        return answer

    async def _taken(self) -> None:
        self._books.queued.taken(self._key, await rpc.counted_from(self._call))

    def computed(self) -> None:
        """The worker has told the prompt's result."""
        self._worker.reported.prefixes.expect(self._block_names)
        self._books.prefill_pace.computed(self._key)


class DecodeHold:
    """An attempt on a decode worker: `async with` enters it, and takes everything back.

    placed ──reserve──▶ reserved, its lease is renewed ──reported_end──▶ the worker holds nothing, and may leave
      └── left, in whatever way: nothing more is taken from the worker, which is sent Abort unless it told the end
    """

    def __init__(
        self,
        worker: Worker,
        request: EngineRequest,
        blocks: int,
        put: Callable[[worker_pb2.RequestTokens], None],
        on_loss: OnLoss,
    ) -> None:
        """put: gets its tokens. on_loss is not called any more once the worker has told its last token."""
        self._worker, self._books = worker, worker.books
        self._request = request
        self._key = request.request_id
        self._blocks = blocks
        self.put = put
        self._on_loss = on_loss
        self.reservation = worker_pb2.Reservation()
        self._ended = False
        self._abort: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._books.promised.place(self._key, self._blocks)
        self._books.subscription.register(self._key, self._request.attempt, self)
        self._worker.attach(self._key, Role.DECODE, self._on_loss)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._books.promised.drop(self._key)
        self._let_go()
        self._books.subscription.forget(self._key, self._request.attempt)
        if not self._ended:
            # Shielded: a client that leaves while we wait cannot stop the release.
            await asyncio.shield(self.abort())

    async def reserve(self, transport: str, timeout_s: float) -> worker_pb2.Reservation:
        """timeout_s: until the request's deadline. Raises a TandemError."""
        message = worker_pb2.ReserveRequest(
            request=wire.request_to_wire(self._request),
            subscriber_id=self._books.subscription.id,
            lease_ms=self._worker.link.lease_ms,
            transport=transport,
            # 0 would mean that there is no deadline.
            deadline_ms=max(1, round(timeout_s * 1000)),
        )
        with self._worker.link.calling(Role.DECODE):
            self.reservation = await self._worker.link.decode.Reserve(message, timeout=timeout_s)
        self._books.promised.taken(self._key, self.reservation.counted_from)
        self._books.leases.add(self.reservation.reservation_id)
        return self.reservation

    def reported_end(self) -> None:
        """Nothing depends on the decode worker: it may leave, however slowly the client reads."""
        if not self._ended:
            self._ended = True
            self._let_go()

    def _let_go(self) -> None:
        self._books.leases.discard(self.reservation.reservation_id)
        self._worker.detach(self._key, Role.DECODE)

    def abort(self) -> asyncio.Task[None]:
        """Once; before the scope is left where the worker is not needed, and its answer is not about the request."""
        self._books.subscription.forget(self._key, self._request.attempt)
        self._abort = self._abort or self._worker.link.abort(self._key, self._request.attempt)
        return self._abort
