"""The open loop: every request is sent when it is due, whatever became of those before it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

from loadtest.metrics import Outcome
from loadtest.schedule.workloads import LoadRequest
from loadtest.targets.target import LoadTarget


@dataclass(frozen=True)
class Arrival:
    # Seconds after the start.
    at_s: float
    request: LoadRequest


@dataclass
class LoadRun:
    """What became of a schedule; whoever holds it may watch while it runs."""

    planned: int
    # One for each request that has become due, in that order.
    outcomes: list[Outcome] = field(default_factory=list)
    ended: int = 0
    failed: int = 0
    started_s: float = 0.0
    duration_s: float = 0.0
    # Stopped before its end: what was under way then has failed as `interrupted`, the rest was never offered.
    interrupted: bool = False


class Watch(Protocol):
    """Told of every change."""

    def __call__(self, run: LoadRun) -> None: ...


class Runner:
    """Sends one schedule. `max_concurrency` holds requests back at the client; the schedule's clock goes on."""

    def __init__(
        self, target: LoadTarget, schedule: Sequence[Arrival], max_concurrency: int | None, watch: Watch | None = None
    ) -> None:
        self._target = target
        self._schedule = schedule
        self._slots: AbstractAsyncContextManager[object] = (
            asyncio.Semaphore(max_concurrency) if max_concurrency else nullcontext()
        )
        self._watch = watch or (lambda run: None)
        self.run = LoadRun(len(schedule))

    async def send_all(self, stop: asyncio.Event) -> LoadRun:
        """Until every answer has ended, or `stop` is set: then what is under way is cancelled."""
        run = self.run
        run.started_s = time.perf_counter()
        sending, stopping = asyncio.create_task(self._send()), asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({sending, stopping}, return_when=asyncio.FIRST_COMPLETED)
            run.interrupted = not sending.done()
        finally:
            # Taken first: how long it takes to cancel is not part of what was measured.
            run.duration_s = time.perf_counter() - run.started_s
            sending.cancel()
            stopping.cancel()
            ended = await asyncio.gather(sending, stopping, return_exceptions=True)
        if isinstance(ended[0], Exception):
            raise ended[0]
        return run

    async def _send(self) -> None:
        async with asyncio.TaskGroup() as answers:
            for arrival in self._schedule:
                due_s = self.run.started_s + arrival.at_s
                # Also when it is late: requests already under way get the loop first.
                await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
                outcome = Outcome(due_s, len(arrival.request.prompt_ids))
                self.run.outcomes.append(outcome)
                answers.create_task(self._one(arrival.request, outcome))
                self._watch(self.run)

    async def _one(self, request: LoadRequest, outcome: Outcome) -> None:
        try:
            async with self._slots:
                await self._target.send_request(request, outcome)
            if outcome.ok and not outcome.arrivals_s:
                outcome.set_failure("no_tokens", "the answer ended without a token")
        except asyncio.CancelledError:
            outcome.set_failure("interrupted", "the run was stopped before this answer ended")
            raise
        finally:
            outcome.ended = True
            self.run.ended += 1
            self.run.failed += not outcome.ok
            self._watch(self.run)
