"""The blocking client, for scripts, notebooks and threads: the asyncio client's words over gRPC's blocking calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, Self, Unpack

import grpc

from tandem import rpc, wire
from tandem.client.completion import Completion, EventReader, collect
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


class Generation:
    """One answer under way; see AsyncGeneration. `close()` may be called from another thread."""

    def __init__(self, start: Callable[[], Any], address: str) -> None:
        self._start = start
        self._address = address
        self._call: Any = None

    def __iter__(self) -> Iterator[Event]:
        if self._call is not None:
            raise RuntimeError("an answer can be iterated only once")
        self._call = self._start()
        return _Events(self._call, self._address)

    def close(self) -> None:
        if self._call is not None:
            self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Events:
    """Owns one call: when nobody can read it any more, it is cancelled."""

    def __init__(self, call: Any, address: str) -> None:
        self._call = call
        self._address = address
        self._reader = EventReader()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        """Raises TandemError."""
        try:
            return self._reader.read_event(next(self._call))
        except StopIteration:
            self._reader.check_ended()
            raise
        except grpc.RpcError as error:
            raise explain(error, self._address) from None

    def __del__(self) -> None:
        self._call.cancel()


class Client:
    """Talks to one router, from any thread. Every method raises TandemError, as those of AsyncClient do."""

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout_s: float | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        """`address` is the router's host:port; `timeout_s` is the deadline of answers that bring none of their own."""
        self._address = address
        self._timeout_s = check_timeout(timeout_s)
        self._channel = grpc.insecure_channel(address, options=rpc.client_options(max_message_bytes))
        self._stub: Any = generation_pb2_grpc.GenerationStub(self._channel)
        self._admin: Any = registry_pb2_grpc.RouterAdminStub(self._channel)
        self._closed = False

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
    ) -> Generation:
        """Streams the answer: `for event in client.generate(...)`. See AsyncClient.generate."""
        options = RequestOptions(n, stop, model, cache_salt, user_tag, keep_special_tokens)
        request = build_request(prompt, sampling, fields, options)
        deadline_s = self._timeout_s if timeout_s is None else check_timeout(timeout_s)
        return Generation(lambda: self._open_stub().Generate(request, timeout=deadline_s), self._address)

    def complete(
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
        return collect(self.generate(prompt, sampling=sampling, timeout_s=timeout_s, **vars(options), **fields))

    def embed(
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
        """One vector for each input. See AsyncClient.embed."""
        request = build_embed_request(inputs, EmbedOptions(pooling, normalize, model, cache_salt, user_tag))
        deadline_s = self._timeout_s if timeout_s is None else timeout_s
        return embeddings_from_wire(self._unary(self._open_stub().Embed, request, deadline_s))

    def status(self, check_integrity: bool = False, *, timeout_s: float = ADMIN_TIMEOUT_S) -> ServiceStatus:
        """Pools, load and live requests; with `check_integrity` every worker checks its block pool."""
        request = generation_pb2.StatusRequest(check_integrity=check_integrity)
        return status_from_wire(self._unary(self._open_stub().Status, request, timeout_s))

    def models(self, *, timeout_s: float = ADMIN_TIMEOUT_S) -> tuple[ModelInfo, ...]:
        """The models that the joined workers serve."""
        answer = self._unary(self._open_stub().ListModels, generation_pb2.ListModelsRequest(), timeout_s)
        return tuple(map(wire.model_from_wire, answer.models))

    def drain_worker(self, worker_id: str, *, timeout_s: float = ADMIN_TIMEOUT_S) -> None:
        """The worker gets no new work, finishes what is live and leaves; returns once it has been told."""
        request = registry_pb2.DrainWorkerRequest(worker_id=worker_id)
        self._unary(self._open_admin().DrainWorker, request, timeout_s)

    def set_worker_roles(self, worker_id: str, roles: Iterable[Role], *, timeout_s: float = ADMIN_TIMEOUT_S) -> None:
        """The worker plays these roles from now on; returns once it has been told, and `status` shows when it does.

        Live work of a dropped role goes on to its end.
        """
        request = registry_pb2.SetWorkerRolesRequest(worker_id=worker_id, roles=wire.roles_to_wire(frozenset(roles)))
        self._unary(self._open_admin().SetWorkerRoles, request, timeout_s)

    def _open_stub(self) -> Any:
        if self._closed:
            raise RuntimeError("the client is closed")
        return self._stub

    def _open_admin(self) -> Any:
        self._open_stub()
        return self._admin

    def _unary(self, method: Any, request: Any, timeout_s: float | None) -> Any:
        try:
            return method(request, timeout=check_timeout(timeout_s))
        except grpc.RpcError as error:
            raise explain(error, self._address) from None

    def close(self) -> None:
        """Cancels what is under way and closes the connection."""
        self._closed = True
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
