"""One request from the door to its end, whatever the door: all of its parts at once, one deadline, one outcome."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Protocol

from router.admission import Admission, Admitted, AdmittedEmbed, Gate, answers_of, deadline_s
from router.aio import ends_after, first_error, first_of
from router.attempt import Brief
from router.choice import Choice, Emit, OnRetry
from router.embedding import EmbedJob
from router.output import output_of
from router.pace import OutputShare, check_deadline
from router.placement import Demand
from router.registry import Registry
from router.request_log import RequestLog
from tandem import errors, logs
from tandem.config import RouterConfig
from tandem.timeline import Phase, Timeline
from tandem.types import Accepted, ChoiceFinished, Completed, Event, Usage
from tandem.v1 import generation_pb2

log = logging.getLogger(__name__)

# Requests that a closing router has failed have this long to tell their clients.
END_S = 2.0
# A client for which something has waited in the process for this long is gone, as far as every door is concerned. What
# waits is bounded: one event of a stream or one whole answer, and the tokens that its request may have.
STALL_S = 30.0
# No request needs less.
_LEAST = Demand(1, 1)


class Job(Protocol):
    """A part of a request: one of n choices, or all inputs of an Embed call."""

    timeline: Timeline

    @property
    def prefill_worker(self) -> str:
        """Its id, for reports; empty until placed."""

    @property
    def decode_worker(self) -> str:
        """As prefill_worker."""

    @property
    def phase(self) -> Phase:
        """The furthest phase that it is known to have reached."""

    def fail(self, error: errors.TandemError) -> None:
        """Ends it from outside."""


@dataclass(frozen=True)
class Live:
    """An accepted request that has not ended."""

    request_id: str
    timeline: Timeline
    jobs: tuple[Job, ...]


class Observer(Protocol):
    """Hears how requests fare, for metrics."""

    def answered(self, finished: ChoiceFinished) -> None:
        """One choice ended by stop or length."""

    def retried(self, reason: errors.TandemError, transport: str) -> None:
        """An attempt at one choice, whose KV went by this transport, failed; another one follows."""

    def ended(self, outcome: str) -> None:
        """A request ended, or was refused: "ok", or its error's code."""


class Orchestrator:
    """Every door calls `generate`; who is live and how others ended is counted here.

    open ──close()──▶ closing: new requests are refused, live ones have a grace ──▶ closed: the rest have failed
    """

    def __init__(self, config: RouterConfig, registry: Registry, admission: Admission) -> None:
        self._config = config
        self._registry = registry
        self._admission = admission
        self._gate = Gate(config.max_live_requests)
        self._output = OutputShare()
        self._live: dict[str, Live] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._closing = False
        self.observers: list[Observer] = []
        # Accepted requests that completed, and that ended otherwise (an error, or the client left).
        self.finished = self.failed = self.cancelled = 0

    @property
    def live(self) -> tuple[Live, ...]:
        """Oldest first."""
        return tuple(self._live.values())

    def check_size(self, requests: Sequence[generation_pb2.GenerateRequest]) -> None:
        """Raises InvalidRequest when so many, the prompts of one body, could never be live at once."""
        answers, prompts = sum(map(answers_of, requests)), len(requests)
        field = "n" if answers > prompts else "prompt"
        asked = f"prompt x n ({prompts} x {answers // prompts})" if answers > prompts > 1 else field
        self._gate.check(answers, field, asked)

    async def generate(
        self,
        request: generation_pb2.GenerateRequest,
        remaining_s: float | None,
        emit: Emit,
        entry: RequestLog,
        *,
        part: int | None = None,
        counted: bool = True,
    ) -> None:
        """Emits the events of one request; returns after Completed, or raises a TandemError.

        remaining_s: the caller's deadline. emit is never called twice at once, and its waiting slows the request
        down, not the workers. Cancelling the call releases everything. entry: of what its client asked for; part: of
        several such requests. counted: observers hear of it.
        """
        request_id = entry.request_id if part is None else f"{entry.request_id}-{part}"
        timeline, observers = Timeline(), tuple(self.observers) if counted else ()
        with _observed(observers):
            async with self._room(remaining_s, answers_of(request)) as deadline:
                admitted = await self._admission.admit(request, request_id)
                timeline.mark(Phase.ADMITTED)
                self.check_open()
                demand = Demand(len(admitted.prompt_ids), admitted.sampling.max_tokens)
                self._check_deadline(demand, admitted.n, admitted.block_names, deadline)
                hand_over = _one_at_a_time(emit, entry, observers)
                await self._run(admitted, timeline, deadline, hand_over, _each_told(observers), entry)

    async def check_room(self) -> None:
        """For doors, before they look at a request without a deadline. Raises Unavailable or Overloaded when `generate`
        would refuse it now whatever it is; observers hear of it.
        """
        try:
            async with self._room(None):
                pass
        except errors.TandemError as error:
            for observer in self.observers:
                observer.ended(error.code)
            raise

    @asynccontextmanager
    async def _room(self, remaining_s: float | None, answers: int = 1) -> AsyncIterator[float]:
        """As _let_in. Most of those that are refused cost no more than this."""
        async with self._let_in(remaining_s, answers) as deadline:
            self._check_deadline(_LEAST, 1, (), deadline)
            yield deadline

    def _check_deadline(self, demand: Demand, answers: int, block_names: Sequence[bytes], deadline: float) -> None:
        """Raises Overloaded when the answers would come too late, by what has been measured of the workers."""
        try:
            ahead, to_compute = self._registry.ahead(demand, answers, block_names)
        except (errors.Unavailable, errors.InvalidRequest):
            return  # placing it will say so
        remaining_s = deadline - asyncio.get_running_loop().time()
        check_deadline(ahead, to_compute, self._output.expected(demand.max_tokens), answers, remaining_s)

    def _check_embed_deadline(self, admitted: AdmittedEmbed, deadline: float) -> None:
        """The longest input must be computed in time. Raises Overloaded."""
        tokens = max(len(prompt.prompt_ids) for prompt in admitted.prompts)
        try:
            pace = self._registry.prefill_pace(tokens)
        except (errors.Unavailable, errors.InvalidRequest):
            return  # placing it will say so
        pace.check(pace.queued_tokens + tokens, deadline - asyncio.get_running_loop().time())

    async def embed(
        self, request: generation_pb2.EmbedRequest, remaining_s: float | None, entry: RequestLog
    ) -> generation_pb2.EmbedResponse:
        """Raises a TandemError. Cancelling the call releases everything."""
        with _observed(tuple(self.observers)):
            async with self._let_in(remaining_s) as deadline:
                return await self._embed(request, Timeline(), deadline, entry)

    async def _embed(
        self, request: generation_pb2.EmbedRequest, timeline: Timeline, deadline: float, entry: RequestLog
    ) -> generation_pb2.EmbedResponse:
        admitted = await self._admission.admit_embed(request, entry.request_id)
        timeline.mark(Phase.ADMITTED)
        self.check_open()
        self._check_embed_deadline(admitted, deadline)
        job = EmbedJob(admitted, deadline, timeline, self._registry)
        entry.model, entry.tag = self._registry.served().name, admitted.user_tag
        entry.prompt_tokens = admitted.prompt_tokens
        async with self._counted(Live(admitted.request_id, timeline, (job,)), entry):
            return await job.run()

    @asynccontextmanager
    async def _let_in(self, remaining_s: float | None, answers: int = 1) -> AsyncIterator[float]:
        """Yields the deadline on the event loop's clock. Raises as Gate.enter, Unavailable or DeadlineExceeded."""
        self.check_open()
        with self._gate.enter(answers):
            async with ends_after(deadline_s(remaining_s, self._config)) as deadline:
                yield deadline

    async def close(self, grace_s: float, hurry: asyncio.Event) -> None:
        """Refuses new requests, lets live ones finish for a while, or until `hurry` is set, then fails them. Returns
        when none is live, or their clients do not take the news.
        """
        self._closing = True
        with suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await first_of(_until(self._idle), _until(hurry))
        if self._live:
            log.warning("%d requests are still live: ending them", len(self._live))
        for live in self._live.values():
            for job in live.jobs:
                words = "the router stopped before the request had ended"
                job.fail(errors.Unavailable(words, retry_after_ms=errors.RETRY_AFTER_MS))
        with suppress(TimeoutError):
            async with asyncio.timeout(END_S):
                await self._idle.wait()

    def check_open(self) -> None:
        """Raises Unavailable once it is closing."""
        if self._closing:
            raise errors.Unavailable("the router is stopping", retry_after_ms=errors.RETRY_AFTER_MS)

    async def _run(
        self,
        admitted: Admitted,
        timeline: Timeline,
        deadline: float,
        emit: Emit,
        on_retry: OnRetry,
        entry: RequestLog,
    ) -> None:
        choices = tuple(
            self._choice(admitted, index, timeline, deadline, emit, on_retry) for index in range(admitted.n)
        )
        entry.model, entry.tag = admitted.model.name, admitted.user_tag
        async with self._counted(Live(admitted.request_id, timeline, choices), entry):
            await emit(Accepted(admitted.request_id, len(admitted.prompt_ids)))
            try:
                with first_error():
                    async with asyncio.TaskGroup() as tasks:
                        for choice in choices:
                            tasks.create_task(choice.run())
            finally:
                for choice in choices:
                    self._output.ended(choice.output_tokens, admitted.sampling.max_tokens if choice.whole else 0)
            await emit(Completed(_usage(admitted, choices)))

    def _choice(
        self, admitted: Admitted, index: int, timeline: Timeline, deadline: float, emit: Emit, on_retry: OnRetry
    ) -> Choice:
        request = admitted.choice(index)
        marks = replace(timeline, marks=dict(timeline.marks))
        brief = Brief(index, request, admitted.block_names, deadline, marks, self._config.transport)
        output = output_of(admitted, self._admission.tokenizer)
        return Choice(brief, output, self._registry, emit, on_retry)

    @asynccontextmanager
    async def _counted(self, live: Live, entry: RequestLog) -> AsyncIterator[None]:
        """The one place where an accepted request begins and ends (law 2)."""
        logs.about(live.request_id)
        log.debug("accepted")
        self._live[live.request_id] = live
        self._idle.clear()
        try:
            yield
            self.finished += 1
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError | errors.Cancelled | errors.DeadlineExceeded):
                self.cancelled += 1
            else:
                self.failed += 1
            if isinstance(error, errors.TandemError | asyncio.CancelledError):
                raise
            # Its details stay here; its caller learns that there was one.
            log.exception("unexpected error", extra={"request_id": live.request_id})
            raise errors.InternalError("internal error; the router's log has the details") from error
        finally:
            entry.placed(live.jobs)
            del self._live[live.request_id]
            if not self._live:
                self._idle.set()


async def _until(event: asyncio.Event) -> None:
    await event.wait()


@contextmanager
def _observed(observers: tuple[Observer, ...]) -> Iterator[None]:
    outcome = "ok"
    try:
        yield
    except asyncio.CancelledError:
        outcome = errors.Cancelled.code
        raise
    except errors.TandemError as error:
        outcome = error.code
        raise
    except BaseException:
        outcome = errors.InternalError.code
        raise
    finally:
        for observer in observers:
            observer.ended(outcome)


def _one_at_a_time(emit: Emit, entry: RequestLog, observers: tuple[Observer, ...]) -> Emit:
    lock = asyncio.Lock()

    async def locked(event: Event) -> None:
        entry.heard(event)
        if isinstance(event, ChoiceFinished):
            for observer in observers:
                observer.answered(event)
        async with lock:
            await emit(event)

    return locked


def _each_told(observers: tuple[Observer, ...]) -> OnRetry:
    def tell(reason: errors.TandemError, transport: str) -> None:
        for observer in observers:
            observer.retried(reason, transport)

    return tell


def _usage(admitted: Admitted, choices: tuple[Choice, ...]) -> Usage:
    return Usage(
        prompt_tokens=len(admitted.prompt_ids),
        output_tokens=sum(choice.output_tokens for choice in choices),
        cached_prompt_tokens=choices[0].cached_prompt_tokens,
    )
