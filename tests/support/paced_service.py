"""A router and an OpenAI endpoint that answer at scripted paces, for load tests that know what must come out.

The servers run in threads of this process, so that both sides share a clock: a server notes when it was asked and when
it wrote."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import scripted_openai
from scripted_openai import ScriptedOpenAI
from scripted_router import REPORT, ScriptedRouter, serving

from loadtest.schedule.plan import Plan
from loadtest.session import Measuring, Result, measure
from loadtest.targets.grpc import GrpcTarget
from loadtest.targets.openai import OpenAITarget
from loadtest.targets.target import LoadTarget, SendOptions
from tandem.types import Accepted, ChoiceFinished, Completed, Delta, FinishReason, Token, Usage
from tandem.v1 import generation_pb2, registry_pb2

# How late nine of ten tokens may be for a script to count as kept.
KEPT_MS = 3.0
OUTPUT = 6


@dataclass
class Pace:
    """What an answer waits for: before its first token, and between two."""

    first_s: float
    gap_s: float


FAST, SLOW = Pace(0.05, 0.01), Pace(0.2, 0.04)


@dataclass
class Note:
    """What the server knows of one answer."""

    asked_s: float
    written_s: list[float] = field(default_factory=list)
    # How much later than scripted each token was.
    late_s: list[float] = field(default_factory=list)


@dataclass
class Scripted:
    """Answers by turns at these paces, OUTPUT tokens each, and takes notes."""

    paces: list[Pace]
    notes: list[Note] = field(default_factory=list)

    async def answer(self, write: Callable[[], Awaitable[None]]) -> None:
        note = Note(time.perf_counter())
        pace = self.paces[len(self.notes) % len(self.paces)]
        self.notes.append(note)
        due_s = note.asked_s + pace.first_s
        for _ in range(OUTPUT):
            # By the clock, so that late wake-ups do not add up.
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            note.written_s.append(time.perf_counter())
            note.late_s.append(note.written_s[-1] - due_s)
            await write()
            due_s += pace.gap_s

    def kept(self) -> bool:
        late_s = sorted(each for note in self.notes for each in note.late_s)
        return late_s[len(late_s) * 9 // 10] * 1000 < KEPT_MS

    async def by_grpc(self, request: generation_pb2.GenerateRequest, emit: Any) -> None:
        prompt = len(request.token_ids.ids)
        await emit(Accepted("r", prompt))
        await self.answer(lambda: emit(Delta(0, (Token(7),), "a")))
        await emit(ChoiceFinished(0, FinishReason.LENGTH, OUTPUT, REPORT))
        await emit(Completed(Usage(prompt, OUTPUT)))

    async def by_http(self, body: dict[str, Any], write: scripted_openai.Write) -> None:
        await self.answer(lambda: write(scripted_openai.token()))
        await write(scripted_openai.usage(len(body["prompt"]), OUTPUT) + scripted_openai.DONE)


def joined() -> generation_pb2.StatusResponse:
    model = registry_pb2.ModelInfo(name="scripted", vocab_size=500, max_model_len=4096)
    return generation_pb2.StatusResponse(models=[model])


@contextmanager
def address_of(kind: str, scripted: Scripted) -> Iterator[str]:
    if kind == "grpc":
        with serving(ScriptedRouter(scripted.by_grpc, joined())) as router:
            yield router.address
    else:
        with scripted_openai.serving(ScriptedOpenAI(scripted.by_http)) as endpoint:
            yield endpoint.url


def make_target(kind: str, address: str, **options: Any) -> LoadTarget:
    return (GrpcTarget if kind == "grpc" else OpenAITarget)(address, SendOptions(**options))


@asynccontextmanager
async def target_of(kind: str, scripted: Scripted) -> AsyncIterator[LoadTarget]:
    with address_of(kind, scripted) as address:
        target = make_target(kind, address)
        try:
            yield target
        finally:
            await target.close()


async def measured(target: LoadTarget, load: Plan, measuring: Measuring | None = None) -> Result:
    return await measure(target, load, measuring or Measuring(), asyncio.Event())
