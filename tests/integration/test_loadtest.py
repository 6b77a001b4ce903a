"""Load tests against servers with scripted delays: what is measured is what was done, and the loop stays open.

The servers run in threads of this process, so that both sides share a clock: a server notes when it was asked and when
it wrote, and figures must be those of its notes within TOLERANCE_MS, which covers the two loops and the socket between.
A machine that is too busy for a server to keep its script proves nothing: then it is measured again, ATTEMPTS times at
most.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import scripted_openai
from scripted_openai import ScriptedOpenAI
from scripted_router import REPORT, ScriptedRouter, serving
from service import ROOT

from loadtest.grpc_target import GrpcTarget
from loadtest.openai_target import OpenAITarget
from loadtest.plan import Plan
from loadtest.runner import Arrival, Run, Runner
from loadtest.session import Measuring, Result, measure
from loadtest.target import SendOptions, Target
from loadtest.workloads import Lengths, Vocabulary, random_requests
from tandem.errors import ModelNotFound, Overloaded, Refused, TandemError, Unavailable
from tandem.types import Accepted, ChoiceFinished, Completed, Delta, FinishReason, Token, Usage
from tandem.v1 import generation_pb2, registry_pb2

TOLERANCE_MS = 10.0
ATTEMPTS = 6
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


def make_target(kind: str, address: str, **options: Any) -> Target:
    return (GrpcTarget if kind == "grpc" else OpenAITarget)(address, SendOptions(**options))


@asynccontextmanager
async def target_of(kind: str, scripted: Scripted) -> AsyncIterator[Target]:
    with address_of(kind, scripted) as address:
        target = make_target(kind, address)
        try:
            yield target
        finally:
            await target.close()


BOTH = pytest.mark.parametrize("kind", ["grpc", "openai"])


def plan(count: int, rate: float, input_tokens: int = 20) -> Plan:
    return Plan(num_prompts=count, request_rate=rate, lengths=Lengths(input_tokens, OUTPUT), seed=1)


async def measured(target: Target, load: Plan, measuring: Measuring | None = None) -> Result:
    return await measure(target, load, measuring or Measuring(), asyncio.Event())


async def undisturbed(kind: str, paces: list[Pace], load: Plan, measuring: Measuring) -> tuple[Result, Scripted]:
    for _ in range(ATTEMPTS):
        scripted = Scripted(paces)
        async with target_of(kind, scripted) as target:
            result = await measured(target, load, measuring)
        if scripted.kept():
            break
    return result, scripted


@BOTH
async def test_scripted_delays_come_back(kind: str) -> None:
    # Both limits lie far from both paces: half of the answers are good.
    measuring = Measuring(num_warmups=2, goodput={"ttft": 125, "tpot": 25}, percentiles=(25, 75))
    result, scripted = await undisturbed(kind, [FAST, SLOW], plan(40, 40), measuring)
    found, notes = result.figures, scripted.notes[2:]
    assert (found["offered"], found["completed"], found["failures"]) == (40, 40, {})
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (40 * 20, 40 * OUTPUT)

    ttfts = [(note.written_s[0] - note.asked_s) * 1000 for note in notes]
    e2els = [(note.written_s[-1] - note.asked_s) * 1000 for note in notes]
    tpots = [(e2el - ttft) / (OUTPUT - 1) for ttft, e2el in zip(ttfts, e2els, strict=True)]
    for name, by_server in (("ttft", ttfts), ("e2el", e2els), ("tpot", tpots), ("itl", tpots)):
        assert found[f"mean_{name}_ms"] == pytest.approx(statistics.mean(by_server), abs=TOLERANCE_MS), name
    # And the script was kept: half of the answers took the one pace, half the other.
    for name, fast_ms, slow_ms in (("ttft", 50, 200), ("tpot", 10, 40), ("e2el", 100, 400)):
        assert found[f"p25_{name}_ms"] == pytest.approx(fast_ms, abs=TOLERANCE_MS), name
        assert found[f"p75_{name}_ms"] == pytest.approx(slow_ms, abs=TOLERANCE_MS), name

    assert found["request_goodput"] == pytest.approx(20 / found["duration"], rel=0.06)
    assert found["attainment"] == pytest.approx(0.5, abs=0.03)
    # 40 arrivals at 40 a second, then the last answer.
    assert 1.0 + 0.4 <= found["duration"] < 3.0
    assert found["request_throughput"] == pytest.approx(40 / found["duration"])


@BOTH
async def test_a_server_that_stalls_does_not_slow_the_arrivals(kind: str) -> None:
    """Until half a second after the last request came, only the first one is answered: nobody waits for the others.

    That the run ends at all proves it: a loop that waited for an answer would never send the last request.
    """
    opened = threading.Event()

    class Stalling(Scripted):
        async def answer(self, write: Callable[[], Awaitable[None]]) -> None:
            if self.notes:
                note = Note(time.perf_counter())
                self.notes.append(note)
                await asyncio.to_thread(opened.wait, 30)
                await write()
            else:
                await super().answer(write)

    scripted = Stalling([FAST])
    schedule = plan(30, 60)

    async def open_late() -> float:
        while len(scripted.notes) < 30:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.5)
        opened.set()
        return time.perf_counter()

    async with target_of(kind, scripted) as target:
        opening = asyncio.create_task(asyncio.wait_for(open_late(), 30))
        result = await measured(target, schedule)
    opened_s = await opening
    outcomes = result.run.outcomes
    # Every request was at the server when it was due, though the ones before it had no answer yet.
    due = [each.scheduled_s for each in outcomes]
    late_ms = [(note.asked_s - at_s) * 1000 for note, at_s in zip(scripted.notes, due, strict=True)]
    assert statistics.median(late_ms) < 250
    # And what the stall cost is in the figures, from the schedule on.
    expected = [(opened_s - at_s) * 1000 for at_s in due[1:]]
    ours = [(each.arrivals_s[0] - each.scheduled_s) * 1000 for each in outcomes[1:]]
    assert statistics.mean(ours) == pytest.approx(statistics.mean(expected), abs=10 * TOLERANCE_MS)
    assert result.figures["from_schedule"]["mean_ttft_ms"] > 500


@BOTH
async def test_waiting_at_the_client_is_not_omitted(kind: str) -> None:
    """One at a time, all due at once: from sending all look alike; from the schedule each waits for those before it."""
    load = Plan(num_prompts=8, lengths=Lengths(5, OUTPUT))
    result, _ = await undisturbed(kind, [Pace(0.05, 0.0)], load, Measuring(max_concurrency=1))
    found = result.figures
    assert found["median_ttft_ms"] == pytest.approx(50, abs=TOLERANCE_MS)
    assert found["from_schedule"]["median_ttft_ms"] == pytest.approx(4.5 * 50, abs=6 * TOLERANCE_MS)
    assert found["mean_client_queue_time_ms"] == pytest.approx(3.5 * 50, abs=6 * TOLERANCE_MS)
    assert found["max_concurrent_requests"] >= 1


async def fails_with(target: Target) -> str | None:
    """The kind by which all of three requests fail."""
    schedule = [Arrival(0.0, request) for request in random_requests(3, Lengths(5, 2), Vocabulary(100, 0))]
    run = await Runner(target, schedule, None).send_all(asyncio.Event())
    await target.close()
    (kind,) = {outcome.failure for outcome in run.outcomes}
    assert all(outcome.error for outcome in run.outcomes)
    assert run.failed == run.ended == 3
    return kind


async def broken(body: dict[str, Any], write: scripted_openai.Write) -> None:
    await write(scripted_openai.token())
    raise ConnectionAbortedError


def writes(*parts: bytes) -> scripted_openai.Script:
    async def script(body: dict[str, Any], write: scripted_openai.Write) -> None:
        for part in parts:
            await write(part)

    return script


async def silent(*_: Any) -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("script", "kind"),
    [
        (broken, "connection"),
        (writes(scripted_openai.token()), "truncated"),
        (writes(scripted_openai.DONE), "no_tokens"),
        (writes(b"data: what\n\n"), "bad_stream"),
        (writes(b"data: 5\n\n"), "bad_stream"),
        (writes(scripted_openai.event({"choices": [], "usage": 5}), scripted_openai.DONE), "bad_stream"),
        (writes(scripted_openai.token(), scripted_openai.event({"error": {"message": "no"}})), "error_event"),
        (silent, "deadline_exceeded"),
    ],
)
async def test_failures_of_an_endpoint_have_kinds(script: scripted_openai.Script, kind: str) -> None:
    with scripted_openai.serving(ScriptedOpenAI(script)) as endpoint:
        assert await fails_with(make_target("openai", endpoint.url, timeout_s=0.5)) == kind


async def test_a_refusal_is_counted_by_its_status() -> None:
    with scripted_openai.serving(ScriptedOpenAI(refusal=(503, "busy"))) as endpoint:
        assert await fails_with(make_target("openai", endpoint.url)) == "http_503"
    assert await fails_with(make_target("openai", endpoint.url)) == "connection"


async def test_failures_of_a_router_have_the_codes_of_its_errors() -> None:
    async def refuse(request: Any, emit: Any) -> None:
        raise Overloaded("full")

    for script, kind in ((refuse, "overloaded"), (silent, "deadline_exceeded")):
        with serving(ScriptedRouter(script, joined())) as router:
            assert await fails_with(make_target("grpc", router.address, timeout_s=0.5)) == kind
    assert await fails_with(make_target("grpc", "127.0.0.1:1")) == "unavailable"


async def test_what_an_endpoint_is_asked() -> None:
    with scripted_openai.serving(ScriptedOpenAI()) as endpoint:
        target = OpenAITarget(endpoint.url + "/v1/", SendOptions(), api_key="secret")
        result = await measured(target, Plan(num_prompts=1, lengths=Lengths(3, 2), vocab_size=1))
        await target.close()
    assert endpoint.requests == [
        {
            "model": "scripted",
            "prompt": [0, 0, 0],
            "max_tokens": 2,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        }
    ]
    assert endpoint.headers[0]["Authorization"] == "Bearer secret"
    assert result.figures["model_id"] == "scripted"


@pytest.mark.parametrize(
    ("models", "error"),
    [({"data": []}, ModelNotFound), ({}, Refused), ({"data": [{"id": 5}]}, ModelNotFound), ([], Refused)],
)
async def test_an_endpoint_without_a_model_is_named(models: Any, error: type[TandemError]) -> None:
    with scripted_openai.serving(ScriptedOpenAI(models=models)) as endpoint:
        target = make_target("openai", endpoint.url)
        with pytest.raises(error):
            await target.describe()
        await target.close()


@pytest.mark.parametrize(
    ("kind", "address"), [("grpc", "127.0.0.1:1"), ("openai", "http://127.0.0.1:1"), ("openai", "nonsense")]
)
async def test_nobody_there(kind: str, address: str) -> None:
    target = make_target(kind, address)
    with pytest.raises(Unavailable, match="cannot reach"):
        await target.describe()
    await target.close()


async def test_a_warm_up_that_fails_ends_the_run() -> None:
    with scripted_openai.serving(ScriptedOpenAI(refusal=(400, "no"))) as endpoint:
        target = make_target("openai", endpoint.url)
        with pytest.raises(Unavailable, match="http_400: no"):
            await measured(target, plan(5, 100), Measuring(num_warmups=2))
        await target.close()


async def test_a_run_that_is_stopped_reports_what_was() -> None:
    stop = asyncio.Event()

    async def second_hangs(request: Any, emit: Any) -> None:
        if len(router.requests) > 1:
            await asyncio.Event().wait()
        await Scripted([FAST]).by_grpc(request, emit)

    def watch(run: Run) -> None:
        if run.ended == 1:
            stop.set()

    router = ScriptedRouter(second_hangs, joined())
    with serving(router):
        target = make_target("grpc", router.address)
        # Two are due in the beginning, the others in an hour.
        requests = random_requests(4, Lengths(5, 2), Vocabulary(100, 0))
        schedule = [Arrival(at_s, each) for at_s, each in zip((0.0, 0.02, 3600.0, 3600.0), requests, strict=True)]
        run = await asyncio.wait_for(Runner(target, schedule, None, watch).send_all(stop), 20)
        assert await asyncio.to_thread(router.cancelled.wait, 5)
        await target.close()
    assert [outcome.failure for outcome in run.outcomes] == [None, "interrupted"]
    assert (run.interrupted, run.planned) == (True, 4)
    assert run.duration_s < 20


def bench(*args: str) -> list[str]:
    return [sys.executable, "-m", "tandem.cli.main", "bench", "run", *args]


def test_the_command_writes_the_keys_of_vllm(tmp_path: Path) -> None:
    wanted = {"ttft", "tpot", "itl", "e2el"}
    with address_of("grpc", Scripted([FAST])) as address:
        command = bench("--router", address, "--num-prompts", "5", "--input-len", "9", "--output-len", str(OUTPUT))
        command += ["--goodput", "ttft:500", "tpot:50", "--output", str(tmp_path / "out.json"), "--save-detailed"]
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    for words in ("TTFT", "from schedule", "goodput from sending", "ttft ≤ 500 ms, tpot ≤ 50 ms", "5 answered"):
        assert words in ran.stdout
    found = json.loads((tmp_path / "out.json").read_text())
    assert {f"{head}_{name}_ms" for name in wanted for head in ("mean", "median", "std", "p99")} <= set(found)
    named = "duration completed failed total_input_tokens total_output_tokens request_throughput request_goodput"
    named += " output_throughput total_token_throughput max_output_tokens_per_s max_concurrent_requests input_lens"
    named += " output_lens ttfts itls latencies start_times queue_times errors date backend model_id num_prompts"
    assert set(named.split()) <= set(found)
    assert (found["request_rate"], found["goodput"]) == ("inf", {"ttft": 500, "tpot": 50})
    assert found["output_lens"] == [OUTPUT] * 5
    assert found["phases_ms"][0]["first_token"] == 12.0


def test_ctrl_c_gives_the_report_so_far(tmp_path: Path) -> None:
    asked = threading.Event()

    async def first_only(request: Any, emit: Any) -> None:
        if len(router.requests) > 1:
            asked.set()
            await asyncio.Event().wait()
        await Scripted([FAST]).by_grpc(request, emit)

    router = ScriptedRouter(first_only, joined())
    output = tmp_path / "out.json"
    with serving(router):
        command = bench("--router", router.address, "--num-prompts", "50", "--request-rate", "2", "--input-len", "4")
        ran = subprocess.Popen(
            [*command, "--output", str(output)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            assert asked.wait(30)
            os.kill(ran.pid, signal.SIGINT)
            out, err = ran.communicate(timeout=20)
        finally:
            ran.kill()
            ran.wait()
    assert (ran.returncode, err) == (130, "")
    assert "requests were not offered any more" in out
    found = json.loads(output.read_text())
    assert found["interrupted"] is True
    assert found["offered"] + found["not_offered"] == 50
    assert found["failures"] == {"interrupted": found["offered"] - found["completed"]}


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--goodput", "itl:5"], 2, "--goodput takes ttft, tpot and e2el"),
        (["--request-rate", "0"], 2, "--request-rate must be above 0"),
        (["--workload", "azure"], 2, "--workload azure needs --trace FILE"),
        (["--ramp-up-strategy", "linear"], 2, "go together"),
        (["--save-detailed"], 2, "--save-detailed belongs to --output"),
        (["--output", "/nowhere/x.json"], 2, "cannot write /nowhere/x.json"),
        (["--timeout", "nan"], 2, "--timeout must be a number of seconds above 0"),
        (["--router", "127.0.0.1:1"], 1, "cannot reach a Tandem router at 127.0.0.1:1"),
        (["--openai", "http://127.0.0.1:1"], 1, "cannot reach an OpenAI endpoint at http://127.0.0.1:1"),
    ],
)
def test_what_cannot_be_is_one_line(args: list[str], code: int, words: str) -> None:
    from typer.testing import CliRunner

    from tandem.cli.app import app

    result = CliRunner().invoke(app, ["bench", "run", *args])
    lines = result.stderr.splitlines()
    assert (result.exit_code, len(lines)) == (code, 1), result.stderr
    assert words in lines[0]
