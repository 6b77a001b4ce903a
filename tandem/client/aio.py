"""The asyncio client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Literal, Self, Unpack

import grpc

from tandem import errors, rpc, wire
from tandem.addresses import dialable
from tandem.client.completion import Collector, Completion, EventReader
from tandem.client.embedding import Embeddings, embeddings_from_wire
from tandem.client.failure import explain
from tandem.client.request import (
    ADMIN_TIMEOUT_S,
    DEFAULT_ADDRESS,
    MAX_MESSAGE_BYTES,
    EmbedOptions,
    Prompt,
    RequestOptions,
    SamplingFields,
    build_embed_request,
    build_request,
    check_timeout,
)
from tandem.client.status import ServiceStatus, status_from_wire
from tandem.types import Event, ModelInfo, Pooling, Role, SamplingParams
from tandem.v1 import generation_pb2, generation_pb2_grpc, registry_pb2, registry_pb2_grpc


class AsyncGeneration:
    """One answer under way: iterate it, once.

    The call starts with the loop and lives exactly as long as the loop: leaving it in any way (break, an exception,
    a cancelled task) cancels the call, because only the loop holds the iterator that owns it. `aclose()`, or leaving
    `async with`, does the same from outside.
    """

    def __init__(self, start: Callable[[], Any], address: str) -> None:
        self._start = start
        self._address = address
        self._call: Any = None

    def __aiter__(self) -> AsyncIterator[Event]:
        if self._call is not None:
            raise RuntimeError("an answer can be iterated only once")
        self._call = self._start()
        return _Events(self._call, self._address)

    async def aclose(self) -> None:
        if self._call is not None:
            self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class _Events:
    """Owns one call: when nobody can read it any more, it is cancelled."""

    def __init__(self, call: Any, address: str) -> None:
        self._call = call
        self._address = address
        self._reader = EventReader()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        """Raises TandemError."""
        message = await self._read()
        if message is None:
            self._reader.check_ended()
            raise StopAsyncIteration
        return self._reader.read_event(message)

    async def _read(self) -> Any:
        try:
            return await rpc.read(self._call)
        except grpc.RpcError as error:
            raise explain(error, self._address) from None
        except asyncio.CancelledError:
            self._call.cancel()
            # gRPC raises it for a call that was cancelled too; only the task's own may leave as it is.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise errors.Cancelled("the answer was closed while it was being read") from None

    def __del__(self) -> None:
        self._call.cancel()


def _checked(address: str) -> str:
    try:
        return dialable(str(address))
    except ValueError as error:
        raise errors.InvalidRequest(str(error), field="address") from None


class AsyncClient:
    """Talks to one router. Use it within one event loop; the connection opens with the first call.

    Every method raises TandemError: Unavailable when no router answers, otherwise what the router said.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout_s: float | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        """`address` is the router's host:port; `timeout_s` is the deadline of answers that bring none of their own.

        Raises InvalidRequest for an address that is none.
        """
        self._address = _checked(address)
        self._timeout_s = check_timeout(timeout_s)
        self._max_message_bytes = max_message_bytes
        self._channel: grpc.aio.Channel | None = None
        self._stub: Any = None
        self._admin: Any = None
        self._closed = False

    def _open_stub(self) -> Any:
        if self._closed:
            raise RuntimeError("the client is closed")
        if self._channel is None:  # not in __init__: gRPC takes the running loop
            self._channel = rpc.make_channel(self._address, self._max_message_bytes)
            self._stub = generation_pb2_grpc.GenerationStub(self._channel)
            self._admin = registry_pb2_grpc.RouterAdminStub(self._channel)
        return self._stub

    def _open_admin(self) -> Any:
        self._open_stub()
        return self._admin

    def generate(
        self,
        prompt: Prompt,
        *,
        sampling: SamplingParams | None = None,
        n: int = 1,
        stop: str | Sequence[str] = (),
        model: str = "",
        cache_salt: str = "",
        user_tag: str = "",
        keep_special_tokens: bool = False,
        timeout_s: float | None = None,
        **fields: Unpack[SamplingFields],
    ) -> AsyncGeneration:
        """Streams the answer: `async for event in client.generate(...)`.

        Yields Accepted, then Delta and ChoiceFinished for each of the `n` choices, then Completed. Keyword fields
        (temperature=..., max_tokens=..., see SamplingParams) go on top of `sampling`. A prompt is text or token ids.
        Raises InvalidRequest at once for what no server could accept; other errors come out of the loop.
        """
        options = RequestOptions(n, stop, model, cache_salt, user_tag, keep_special_tokens)
        request = build_request(prompt, sampling, fields, options)
        deadline_s = self._timeout_s if timeout_s is None else check_timeout(timeout_s)
        return AsyncGeneration(lambda: self._open_stub().Generate(request, timeout=deadline_s), self._address)

    async def complete(
        self,
        prompt: Prompt,
        *,
        sampling: SamplingParams | None = None,
        n: int = 1,
        stop: str | Sequence[str] = (),
        model: str = "",
        cache_salt: str = "",
        user_tag: str = "",
        keep_special_tokens: bool = False,
        timeout_s: float | None = None,
        **fields: Unpack[SamplingFields],
    ) -> Completion:
        """The whole answer; arguments and errors are those of `generate`."""
        options = RequestOptions(n, stop, model, cache_salt, user_tag, keep_special_tokens)
        collector = Collector()
        async for event in self.generate(prompt, sampling=sampling, timeout_s=timeout_s, **vars(options), **fields):
            collector.add_event(event)
        return collector.completion()

    async def embed(
        self,
        inputs: str | Sequence[Prompt],
        *,
        pooling: Pooling | Literal["last", "mean"] = Pooling.LAST,
        normalize: bool = True,
        model: str = "",
        cache_salt: str = "",
        user_tag: str = "",
        timeout_s: float | None = None,
    ) -> Embeddings:
        """One vector for each input: the model's final hidden states, of the last token or their mean.

        inputs: up to 64 prompts, each text or token ids; one text may stand alone. Vectors have length 1 unless
        `normalize` is false.
        """
        request = build_embed_request(inputs, EmbedOptions(pooling, normalize, model, cache_salt, user_tag))
        deadline_s = self._timeout_s if timeout_s is None else timeout_s
        return embeddings_from_wire(await self._unary(self._open_stub().Embed, request, deadline_s))

    async def status(self, check_integrity: bool = False, *, timeout_s: float = ADMIN_TIMEOUT_S) -> ServiceStatus:
        """Pools, load and live requests; with `check_integrity` every worker checks its block pool."""
        request = generation_pb2.StatusRequest(check_integrity=check_integrity)
        return status_from_wire(await self._unary(self._open_stub().Status, request, timeout_s))

    async def models(self, *, timeout_s: float = ADMIN_TIMEOUT_S) -> tuple[ModelInfo, ...]:
        """The models that the joined workers serve."""
        answer = await self._unary(self._open_stub().ListModels, generation_pb2.ListModelsRequest(), timeout_s)
        return tuple(map(wire.model_from_wire, answer.models))

    async def drain_worker(self, worker_id: str, *, timeout_s: float = ADMIN_TIMEOUT_S) -> None:
        """The worker gets no new work, finishes what is live and leaves; returns once it has been told."""
        request = registry_pb2.DrainWorkerRequest(worker_id=worker_id)
        await self._unary(self._open_admin().DrainWorker, request, timeout_s)

    async def set_worker_roles(
        self, worker_id: str, roles: Iterable[Role], *, timeout_s: float = ADMIN_TIMEOUT_S
    ) -> None:
        """The worker plays these roles from now on; returns once it has been told, and `status` shows when it does.

        Live work of a dropped role goes on to its end.
        """
        request = registry_pb2.SetWorkerRolesRequest(worker_id=worker_id, roles=wire.roles_to_wire(frozenset(roles)))
        await self._unary(self._open_admin().SetWorkerRoles, request, timeout_s)

    async def _unary(self, method: Any, request: Any, timeout_s: float | None) -> Any:
        try:
            return await method(request, timeout=check_timeout(timeout_s))
        except grpc.RpcError as error:
            raise explain(error, self._address) from None

    async def close(self) -> None:
        """Cancels what is under way and closes the connection."""
        self._closed = True
        if self._channel is not None:
            await self._channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
