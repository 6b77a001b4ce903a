"""The workers that have joined, and who may join."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import tandem
from router.policy.base import Demand, WorkerView, blocks_for
from router.policy.placement import NEVER_CAME, Placer
from router.pool.pace import Ahead
from router.pool.worker import Worker
from tandem.config import RouterConfig
from tandem.errors import RETRY_AFTER_MS, InvalidRequest, Refused, TandemError, Unavailable
from tandem.types import ModelInfo, Role
from tandem.v1 import registry_pb2
from tandem.wire import model_from_wire, roles_from_wire

log = logging.getLogger(__name__)

# Characters of a text in a hello: they come back in statuses, reports and log lines.
MAX_LABEL_CHARS = 128
# Transports in a hello: a worker knows a few.
MAX_TRANSPORTS = 16
# Why there is no worker (router.policy.placement.Absent).
_JOINING = "is ready yet: one is joining"
_LEFT = "is there: the last one has left"
_LOST = "is there: the last one was lost"
_SILENT = "is there: the last one fell silent, frozen or cut off"


class Silent(Unavailable):
    """A worker's heartbeats have ceased."""


class Registry:
    """Joined workers by id. The first to join an empty registry decides the model; others must fit it.

    All must serve the model that the router was started for: its tokenizer turns text into their token ids.
    """

    def __init__(self, config: RouterConfig, model_name: str) -> None:
        """Raises ConfigError for a policy that there is not."""
        self._config = config
        self._placer = Placer(config.policy)
        self._model_name = model_name
        self._workers: dict[str, Worker] = {}
        # How the last worker of a role went, if none has come since; the latest one last.
        self._gone: dict[Role, str] = {}
        self._closed = False

    @property
    def workers(self) -> tuple[Worker, ...]:
        return tuple(self._workers.values())

    @property
    def model(self) -> ModelInfo | None:
        """What is served; None while nobody is joined."""
        return next((worker.reported.model for worker in self._workers.values()), None)

    def served(self) -> ModelInfo:
        """Raises Unavailable, saying why, while nobody is joined."""
        if (model := self.model) is None:
            why = [NEVER_CAME, *self._gone.values()][-1]
            raise Unavailable(f"no worker {why}, so no model is served", retry_after_ms=RETRY_AFTER_MS)
        return model

    def absent(self) -> dict[Role, str]:
        """Why nobody plays a role, of roles that had somebody or will."""
        joining = {role: _JOINING for worker in self._workers.values() for role in worker.roles - worker.ready_roles}
        return self._gone | joining

    def __getitem__(self, worker_id: str) -> Worker:
        return self._workers[worker_id]

    def snapshot(self, block_names: Sequence[bytes] = ()) -> tuple[WorkerView, ...]:
        """The workers that a request can be placed on, at this moment. block_names: of its prompt's full blocks."""
        return tuple(worker.view(block_names) for worker in self._workers.values() if worker.routable)

    def place(self, demand: Demand, block_names: Sequence[bytes]) -> tuple[WorkerView, WorkerView]:
        """The prefill and the decode worker for a request. Raises as Placer.choose."""
        views = {view.worker_id: view for view in self.snapshot(block_names)}
        placement = self._placer.choose(tuple(views.values()), demand, self.absent())
        return views[placement.prefill], views[placement.decode]

    def place_prefill(self, prompt_tokens: int, block_names: Sequence[bytes] = ()) -> WorkerView:
        """The worker that such a prompt would be computed by now, whoever decodes. Raises as Placer.choose."""
        return self._placer.choose_prefill(self.snapshot(block_names), prompt_tokens, self.absent())

    def ahead(self, demand: Demand, answers: int, block_names: Sequence[bytes]) -> tuple[Ahead, int]:
        """What a request would meet now, and the tokens of its prompt that it would have computed.

        Raises as Placer.choose.
        """
        prefill, decode = self.place(demand, block_names)
        stream = self[decode.worker_id].books.subscription
        missing = blocks_for(demand.kv_tokens, decode.block_size) * answers - decode.free_blocks
        ahead = Ahead(
            prefill=self[prefill.worker_id].books.prefill_pace,
            decode=stream.pace,
            placed=stream.placed,
            decoding=stream.decoding,
            missing=max(0, missing) / decode.total_blocks,
        )
        return ahead, prefill.to_compute(demand.prompt_tokens)

    def admit(self, first: registry_pb2.Heartbeat) -> Worker:
        """Takes a worker in, in place of an older link to the same process. Raises Refused saying what does not fit."""
        hello, older = first.hello, self._workers.get(first.hello.worker_id)
        problem = _malformed(hello) or self._misfit(hello)
        if problem is None and older is not None and not older.reported.is_same_process(hello):
            problem = "a live worker has this worker_id"
        if problem is not None:
            name = hello.worker_id[:MAX_LABEL_CHARS]
            log.warning("refused worker %r at %r: %s", name, hello.address[:MAX_LABEL_CHARS], problem)
            raise Refused(f"the router refused worker {name!r}: {problem}")
        worker = Worker(first, self._config)
        if older is not None:
            self.remove(older, Unavailable("it joined again"))
        self._workers[worker.id] = worker
        for role in worker.roles:
            self._gone.pop(role, None)
        log.info("worker %s joined from %s", worker.id, hello.address)
        return worker

    def _misfit(self, hello: registry_pb2.Hello) -> str | None:
        if hello.version != tandem.__version__:
            return f"tandem version {hello.version!r} against the router's {tandem.__version__!r}"
        if hello.model.name != self._model_name:
            return (
                f"it serves the model {hello.model.name!r}, the router {self._model_name!r} "
                "(give both the same model.path, or the same model.name)"
            )
        others = (worker for worker in self._workers.values() if worker.id != hello.worker_id)
        other = next(others, None)
        return None if other is None else _difference(model_from_wire(hello.model), other)

    def remove(self, worker: Worker, cause: TandemError) -> None:
        """At once out of routing; its live requests fail."""
        if self._workers.get(worker.id) is worker:
            del self._workers[worker.id]
            for role in worker.roles:
                self._gone.pop(role, None)
                self._gone[role] = _LEFT if worker.draining else _SILENT if isinstance(cause, Silent) else _LOST
        if worker.loss is None:
            expected = worker.draining or self._closed
            log.log(logging.INFO if expected else logging.WARNING, "worker %s is out: %s", worker.id, cause)
            worker.lose(cause)

    def close(self) -> None:
        self._closed = True
        for worker in self.workers:
            self.remove(worker, Unavailable("the router stopped"))

    def drain(self, worker_id: str) -> None:
        """Tells a worker to take no new work and to leave when its live requests are done."""
        self._named(worker_id).drain()

    def set_roles(self, worker_id: str, roles: frozenset[Role]) -> None:
        """Tells a worker to play these roles. Raises InvalidRequest for those that its process cannot play."""
        if not roles:
            raise InvalidRequest("roles must name at least one role", field="roles")
        worker = self._named(worker_id)
        playable = roles_from_wire(list(worker.reported.hello.playable))
        if missing := roles - playable:
            can = "+".join(sorted(playable)) or "nothing else"
            words = f"worker {worker_id} cannot play {min(missing)}: its process has services for {can}"
            raise InvalidRequest(words, field="roles")
        worker.set_roles(roles)

    def _named(self, worker_id: str) -> Worker:
        if worker_id not in self._workers:
            joined = ", ".join(sorted(self._workers)) or "none"
            raise InvalidRequest(f"no worker {worker_id!r} has joined; joined: {joined}", field="worker_id")
        return self._workers[worker_id]


def _malformed(hello: registry_pb2.Hello) -> str | None:
    labels = [text for each in hello.transports for text in (each.name, each.domain, each.node)]
    port = hello.address.rpartition(":")[2]
    checks = (
        (bool(hello.worker_id), "hello.worker_id is empty"),
        _label("worker_id", hello.worker_id),
        _label("address", hello.address),
        _label("version", hello.version),
        _label("instance", hello.instance),
        _label("model.name", hello.model.name),
        _label("transports", max(labels, key=len, default="")),
        (len(hello.transports) <= MAX_TRANSPORTS, f"hello.transports has more than {MAX_TRANSPORTS} entries"),
        (port.isdecimal() and 0 < int(port) < 65536, f"hello.address {hello.address!r} is not host:port"),
        (bool(roles_from_wire(list(hello.roles))), "hello.roles names no known role"),
        (hello.total_blocks > 0, "hello.total_blocks is 0"),
        (hello.model.fingerprint.block_size > 0, "hello.model.fingerprint.block_size is 0"),
        (hello.model.vocab_size > 0, "hello.model.vocab_size is 0"),
        (hello.model.max_model_len > 0, "hello.model.max_model_len is 0"),
    )
    return next((problem for ok, problem in checks if not ok), None)


def _label(name: str, text: str) -> tuple[bool, str]:
    limit = f"hello.{name} must have at most {MAX_LABEL_CHARS} characters, not {len(text)}"
    return len(text) <= MAX_LABEL_CHARS, limit


def _difference(model: ModelInfo, other: Worker) -> str | None:
    """Every field counts, not only the fingerprint: the router validates requests once, for all workers."""
    for name in ("name", "vocab_size", "max_model_len", "eos_token_ids"):
        mine, theirs = getattr(model, name), getattr(other.reported.model, name)
        if mine != theirs:
            return f"model {name} {mine} against {theirs} of worker {other.id}"
    difference = model.fingerprint.difference(other.reported.model.fingerprint)
    return None if difference is None else f"{difference} of worker {other.id}"
