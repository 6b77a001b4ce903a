"""A comparison against services whose capacity a test writes down: real sockets, no model."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from scripted_router import REPORT, ScriptedRouter, serving

from loadtest.compare import model
from loadtest.compare.comparing import Comparing
from loadtest.compare.contender import Ending
from loadtest.compare.question import Question
from loadtest.metrics import Goodput
from loadtest.objectives import Objectives
from loadtest.runner import LoadRun
from loadtest.schedule.plan import Plan
from loadtest.schedule.workloads import Lengths
from tandem.types import Accepted, ChoiceFinished, Completed, Delta, FinishReason, Token, Usage
from tandem.v1 import generation_pb2, registry_pb2

OUTPUT = 3
ROLES = (registry_pb2.ROLE_PREFILL, registry_pb2.ROLE_DECODE)


class Line:
    """Serves one request after the other, each for so long."""

    def __init__(self, service_s: float) -> None:
        self._service_s = service_s
        self._one = asyncio.Lock()

    async def answer(self, request: generation_pb2.GenerateRequest, emit: Any) -> None:
        prompt = len(request.token_ids.ids)
        await emit(Accepted("r", prompt))
        async with self._one:
            await asyncio.sleep(self._service_s)
        for _ in range(OUTPUT):
            await emit(Delta(0, (Token(7),), "a"))
        await emit(ChoiceFinished(0, FinishReason.LENGTH, OUTPUT, REPORT))
        await emit(Completed(Usage(prompt, OUTPUT)))


@dataclass
class Scripted:
    """Starts the services: seconds for one request, colocated and split."""

    colocated_s: float
    split_s: float
    pids: tuple[int, int] = (os.getpid(), os.getpid())
    routers: dict[str, ScriptedRouter] = field(default_factory=dict)
    running: int = 0

    @asynccontextmanager
    async def start(self, shape: model.ServiceShape) -> AsyncIterator[str]:
        router = ScriptedRouter(Line(self.split_s if shape.is_split else self.colocated_s).answer, self._status(shape))
        with serving(router):
            self.routers[shape.name], self.running = router, self.running + 1
            try:
                yield router.address
            finally:
                self.running -= 1

    def _status(self, shape: model.ServiceShape) -> generation_pb2.StatusResponse:
        info = registry_pb2.ModelInfo(name="scripted", vocab_size=500, max_model_len=4096)
        status = generation_pb2.StatusResponse(models=[info])
        for index, pid in enumerate(self.pids):
            hello = status.workers.add().hello
            hello.worker_id, hello.pid, hello.device = f"w-{index}", pid, "cpu"
            hello.model.CopyFrom(info)
            hello.roles.extend(ROLES if not shape.is_split else ROLES[index : index + 1])
        return status


@dataclass
class Notes:
    """What a comparison says of its progress; may stop it after so many loads."""

    stop: asyncio.Event
    stop_after: int | None
    # Called with the shape, when a load of it begins.
    at_load: Callable[[str], None]
    loads: list[tuple[str, model.Run, Ending]] = field(default_factory=list)
    failed_shapes: list[tuple[str, str]] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)
    limits_ms: list[Goodput] = field(default_factory=list)

    def report_stage(self, words: str) -> None:
        self.stages.append(words)
        if len(self.loads) == self.stop_after:
            self.stop.set()
        if words.endswith("requests/s"):
            self.at_load(words.rpartition(": ")[0])

    def report_limits(self, goodput: Goodput) -> None:
        self.limits_ms.append(goodput)

    def report_run(self, run: LoadRun) -> None: ...

    def report_ended(self, shape: model.ServiceShape, run: model.Run, ending: Ending) -> None:
        self.loads.append((shape.name, run, ending))

    def report_failed(self, shape: model.ServiceShape, why: str) -> None:
        self.failed_shapes.append((shape.name, why))


def question(**changed: Any) -> Question:
    given: dict[str, Any] = {
        "plan": Plan(num_prompts=20, lengths=Lengths(8, OUTPUT), seed=3),
        "objectives": Objectives({"ttft": 250.0}),
        "workers": 2,
        "step_tokens": (64,),
        "min_seconds": 0.5,
        "resolution": 0.4,
        "draws": 1,
        "start_rps": 60.0,
    }
    return Question(**{**given, **changed})


async def compared(
    scripted: Scripted, asked: Question, stop_after: int | None = None, at_load: Callable[[str], None] | None = None
) -> tuple[model.Comparison, Notes]:
    stop = asyncio.Event()
    notes = Notes(stop, stop_after, at_load or (lambda shape: None))
    try:
        return await Comparing(asked, scripted.start, stop, notes).compare("tandem bench compare"), notes
    finally:
        assert scripted.running == 0
