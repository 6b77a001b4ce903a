"""One request from the door to its end, whatever the door: all of its parts at once, one deadline, one outcome."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Protocol

from router.aio import Scope, ends_after, first_error, first_of
from router.life.admission import Admitted, AdmittedEmbed, ConcurrencyLimit, RequestAdmission, answers_of, deadline_s
from router.life.attempt import ChoiceSpec
from router.life.choice import LiveChoice
from router.life.embedding import EmbedJob
from router.life.events import EmitPacer, EventStream
from router.life.output import output_of
from router.life.request_log import PlacedJob, RequestLog
from router.policy.base import Demand
from router.pool.pace import OutputShare, check_deadline
from router.pool.registry import Registry
from tandem import errors
from tandem.config import RouterConfig
from tandem.process import logs
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


class Job(PlacedJob, Protocol):
    """A part of a request: one of n choices, or all inputs of an Embed call."""

    timeline: Timeline

    @property
    def phase(self) -> Phase:
        """The furthest phase that it is known to have reached."""


class Observer(Protocol):
    """Hears how requests fare, for metrics."""

    def answered(self, finished: ChoiceFinished) -> None:
        """One choice ended by stop or length."""

    def retried(self, reason: errors.TandemError, transport: str) -> None:
        """An attempt at one choice, whose KV went by this transport, failed; another one follows."""

    def ended(self, outcome: str) -> None:
        """A request ended, or was refused: "ok", or its error's code."""


@dataclass
class Live:
    """A request that has not ended."""

    request_id: str
    entry: RequestLog
    observers: tuple[Observer, ...]
    timeline: Timeline = field(default_factory=Timeline)
    events: EventStream = field(default_factory=EventStream)
    # Empty until it is accepted.
    jobs: tuple[Job, ...] = ()
    # Around an accepted one: failed from outside, it ends by that error.
    scope: Scope = field(default_factory=Scope)

    def emitted(self, event: Event) -> None:
        """Its client is about to be given it."""
        self.entry.emitted(event)
        if isinstance(event, ChoiceFinished):
            for observer in self.observers:
                observer.answered(event)

    def retried(self, reason: errors.TandemError, transport: str) -> None:
        for observer in self.observers:
            observer.retried(reason, transport)


class Orchestrator:
    """Every door calls `generate`; who is live and how others ended is counted here.

    open ──close()──▶ closing: new requests are refused, live ones have a grace ──▶ closed: the rest have failed
    """

    def __init__(self, config: RouterConfig, registry: Registry, admission: RequestAdmission) -> None:
        self._config = config
        self._registry = registry
        self._admission = admission
        self._limit = ConcurrencyLimit(config.max_live_requests)
        self._pacer = EmitPacer()
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
        self._limit.check(answers, field, asked)

    async def generate(
        self,
        request: generation_pb2.GenerateRequest,
        remaining_s: float | None,
        entry: RequestLog,
        *,
        part: int | None = None,
        counted: bool = True,
    ) -> AsyncGenerator[Event, None]:
        """The events of one request, up to Completed. Raises a TandemError.

        remaining_s: the caller's deadline. Who is slow to ask for the next event slows the request down, not the
        workers. Closing the generator releases everything (contextlib.aclosing). entry: of what its client asked for;
        part: of several such requests. counted: observers hear of it.
        """
        request_id = entry.request_id if part is None else f"{entry.request_id}-{part}"
        live = Live(request_id, entry, tuple(self.observers) if counted else ())
        # A task of its own, which goes on while its client reads: losses and deadlines wait for nobody.
        life = asyncio.create_task(self._live_through(live, request, remaining_s))
        life.add_done_callback(lambda _: live.events.close())
        try:
            while (event := await live.events.next()) is not None:
                live.emitted(event)
                yield event
            await life
        finally:
            life.cancel()
            await asyncio.wait({life})
            if not life.cancelled():
                life.exception()  # raised above, or of no interest to whoever has left

    async def _live_through(
        self, live: Live, request: generation_pb2.GenerateRequest, remaining_s: float | None
    ) -> None:
        with _observed(live.observers):
            async with self._within_limits(remaining_s, answers_of(request)) as deadline:
                admitted = await self._admission.admit(request, live.request_id)
                live.timeline.mark(Phase.ADMITTED)
                self.check_open()
                demand = Demand(len(admitted.prompt_ids), admitted.sampling.max_tokens)
                self._check_deadline(demand, admitted.n, admitted.block_names, deadline)
                await self._run(live, admitted, deadline)

    async def _run(self, live: Live, admitted: Admitted, deadline: float) -> None:
        choices = tuple(self._choice(live, admitted, index, deadline) for index in range(admitted.n))
        live.entry.model, live.entry.tag = admitted.model.name, admitted.user_tag
        async with self._counted(live, choices):
            live.events.put(Accepted(live.request_id, len(admitted.prompt_ids)))
            try:
                with first_error():
                    async with asyncio.TaskGroup() as tasks:
                        for choice in choices:
                            tasks.create_task(choice.run())
            finally:
                for choice in choices:
                    self._output.ended(choice.output_tokens, admitted.sampling.max_tokens if choice.whole else 0)
            output_tokens = sum(choice.output_tokens for choice in choices)
            usage = Usage(len(admitted.prompt_ids), output_tokens, choices[0].cached_prompt_tokens)
            live.events.put(Completed(usage))
            await live.events.drained()

    def _choice(self, live: Live, admitted: Admitted, index: int, deadline: float) -> LiveChoice:
        request = admitted.choice(index)
        marks = replace(live.timeline, marks=dict(live.timeline.marks))
        spec = ChoiceSpec(index, request, admitted.block_names, deadline, marks, self._config.transport)
        output = output_of(admitted, self._admission.tokenizer)
        return LiveChoice(spec, output, self._registry, self._pacer, live.events, live.retried)

    async def check_limits(self) -> None:
        """For doors, before they look at a request without a deadline. Raises Unavailable or Overloaded when `generate`
        would refuse it now whatever it is; observers hear of it.
        """
        try:
            async with self._within_limits(None):
                pass
        except errors.TandemError as error:
            for observer in self.observers:
                observer.ended(error.code)
            raise

    @asynccontextmanager
    async def _within_limits(self, remaining_s: float | None, answers: int = 1) -> AsyncIterator[float]:
        """As _within_concurrency. Most of those that are refused cost no more than this."""
        async with self._within_concurrency(remaining_s, answers) as deadline:
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
            pace = self._registry[self._registry.place_prefill(tokens).worker_id].books.prefill_pace
        except (errors.Unavailable, errors.InvalidRequest):
            return  # placing it will say so
        pace.check(pace.queued_tokens + tokens, deadline - asyncio.get_running_loop().time())

    async def embed(
        self, request: generation_pb2.EmbedRequest, remaining_s: float | None, entry: RequestLog
    ) -> generation_pb2.EmbedResponse:
        """Raises a TandemError. Cancelling the call releases everything."""
        live = Live(entry.request_id, entry, tuple(self.observers))
        with _observed(live.observers):
            async with self._within_concurrency(remaining_s) as deadline:
                admitted = await self._admission.admit_embed(request, live.request_id)
                live.timeline.mark(Phase.ADMITTED)
                self.check_open()
                self._check_embed_deadline(admitted, deadline)
                job = EmbedJob(admitted, deadline, live.timeline, self._registry)
                entry.model, entry.tag = self._registry.served().name, admitted.user_tag
                entry.prompt_tokens = admitted.prompt_tokens
                async with self._counted(live, (job,)):
                    return await job.run()

    @asynccontextmanager
    async def _within_concurrency(self, remaining_s: float | None, answers: int = 1) -> AsyncIterator[float]:
        """Yields the deadline on the event loop's clock. Raises Unavailable, DeadlineExceeded, or as the limit."""
        self.check_open()
        with self._limit.enter(answers):
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
            words = "the router stopped before the request had ended"
            live.scope.fail(errors.Unavailable(words, retry_after_ms=errors.RETRY_AFTER_MS))
        with suppress(TimeoutError):
            async with asyncio.timeout(END_S):
                await self._idle.wait()

    def check_open(self) -> None:
        """Raises Unavailable once it is closing."""
        if self._closing:
            raise errors.Unavailable("the router is stopping", retry_after_ms=errors.RETRY_AFTER_MS)

    @asynccontextmanager
    async def _counted(self, live: Live, jobs: tuple[Job, ...]) -> AsyncIterator[None]:
        """The one place where an accepted request begins and ends (law 2)."""
        live.jobs = jobs
        logs.about(live.request_id)
        log.debug("accepted")
        self._live[live.request_id] = live
        self._idle.clear()
        try:
            async with live.scope:
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
            live.entry.placed(live.jobs)
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
