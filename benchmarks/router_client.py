"""The clients of router.py. Each answers a line of JSON on stdin with two: that its measured time begins, and what was
seen in it.

    router_client.py streams ROUTER              a line is a case
    router_client.py probe ROUTER WORKERS        a line is {"seconds": ...}

A case is a closed loop: each of `streams` callers sends its next request when its last is answered. What one more
request sees, the probe tells, a process of its own so that the callers do not delay it: one call after another, at
random moments, by turns through the router and to the workers without it (Reserve, then Prefill up to the first token).
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import random
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from tandem import rpc, wire
from tandem.types import EngineRequest, SamplingParams
from tandem.v1 import generation_pb2, generation_pb2_grpc, worker_pb2, worker_pb2_grpc

PROMPT = "Once upon a time there was a router that stood between many clients and a few workers. " * 4
READY_S = 20.0
# As many as the prompt has.
PROBE_IDS = tuple(range(10, 110))
PROBE_TOKENS = 2
PROBE_PAUSE_S = (0.005, 0.035)


@dataclass
class Seen:
    """Within the measured time; seconds."""

    tokens: int = 0
    deltas: int = 0
    requests: int = 0
    ttft: list[float] = field(default_factory=list)
    # From the decode worker's sending of a token to its being here.
    lag: list[float] = field(default_factory=list)


class Clients:
    def __init__(self, router: str) -> None:
        self._router: Any = generation_pb2_grpc.GenerationStub(rpc.make_channel(router))
        self._seen = Seen()

    async def ask(self) -> None:
        """One request. Raises grpc.RpcError."""
        await self._request(PROBE_TOKENS)

    async def run(self, case: dict[str, Any]) -> dict[str, Any]:
        """streams, output_tokens, step_s, warm_s, seconds."""
        spread_s = case["output_tokens"] * case["step_s"] / case["streams"]
        tasks = [
            asyncio.create_task(self._caller(case["output_tokens"], index * spread_s))
            for index in range(case["streams"])
        ]
        await asyncio.sleep(case["warm_s"] + spread_s * case["streams"])
        seen, started_s = Seen(), time.monotonic()
        self._seen = seen
        print(json.dumps({"started": True}), flush=True)
        await asyncio.sleep(case["seconds"])
        self._seen = Seen()
        elapsed_s = time.monotonic() - started_s
        for task in tasks:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        failed = [str(each) for each in outcomes if not isinstance(each, asyncio.CancelledError)]
        return {"elapsed_s": elapsed_s, "failed": failed, **vars(seen)}

    async def _caller(self, output_tokens: int, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        while True:
            await self._request(output_tokens)

    async def _request(self, output_tokens: int) -> None:
        sampling = wire.sampling_to_wire(SamplingParams(max_tokens=output_tokens, seed=1))
        request = generation_pb2.GenerateRequest(text=PROMPT.encode(), sampling=sampling)
        started_s, first = time.monotonic(), True
        call = self._router.Generate(request, timeout=60)
        while (message := await rpc.read(call)) is not None:
            if message.WhichOneof("event") == "delta":
                self._note(message.delta, started_s if first else None)
                first = False
        self._seen.requests += 1

    def _note(self, delta: generation_pb2.Delta, started_s: float | None) -> None:
        seen, now_s = self._seen, time.monotonic()
        seen.deltas += 1
        seen.tokens += len(delta.tokens)
        if started_s is not None:
            seen.ttft.append(now_s - started_s)
        elif delta.tokens[0].logprob:
            seen.lag += [now_s - token.logprob for token in delta.tokens if token.logprob]


class Probe:
    def __init__(self, router: str, workers: str) -> None:
        self._router: Any = generation_pb2_grpc.GenerationStub(rpc.make_channel(router))
        channel = rpc.make_channel(workers)
        self._prefill: Any = worker_pb2_grpc.PrefillWorkerStub(channel)
        self._decode: Any = worker_pb2_grpc.DecodeWorkerStub(channel)
        self._count = 0

    async def ask(self) -> None:
        """One request. Raises grpc.RpcError."""
        await self.routed_ttft()

    async def run(self, asked: dict[str, float]) -> dict[str, list[float]]:
        """seconds."""
        print(json.dumps({"started": True}), flush=True)
        seen: dict[str, list[float]] = {"routed": [], "direct": []}
        end_s, randomness = time.monotonic() + asked["seconds"], random.Random(1)
        while time.monotonic() < end_s:
            for way, ttft in (("routed", self.routed_ttft), ("direct", self.direct_ttft)):
                await asyncio.sleep(randomness.uniform(*PROBE_PAUSE_S))
                seen[way].append(await ttft())
        return seen

    async def routed_ttft(self) -> float:
        sampling = wire.sampling_to_wire(SamplingParams(max_tokens=PROBE_TOKENS, seed=1))
        request = generation_pb2.GenerateRequest(text=PROMPT.encode(), sampling=sampling)
        return await _time_to(self._router.Generate(request, timeout=60), "delta", time.monotonic())

    async def direct_ttft(self) -> float:
        self._count += 1
        sampling = SamplingParams(max_tokens=1)
        request = wire.request_to_wire(EngineRequest(f"probe-{self._count}", PROBE_IDS, sampling))
        started_s = time.monotonic()
        await self._decode.Reserve(worker_pb2.ReserveRequest(request=request))
        target = worker_pb2.TransferTarget(reservation_id=request.request_id)
        call = self._prefill.Prefill(worker_pb2.PrefillRequest(request=request, target=target))
        return await _time_to(call, "first_token", started_s)


async def _time_to(call: Any, event: str, started_s: float) -> float:
    """The call is over on return."""
    seconds = None
    while (message := await rpc.read(call)) is not None:
        if message.WhichOneof("event") == event and seconds is None:
            seconds = time.monotonic() - started_s
    assert seconds is not None, f"the call brought no {event}"
    return seconds


async def ready(clients: Clients | Probe) -> None:
    """Returns when the router has workers and answers."""
    async with asyncio.timeout(READY_S):
        while True:
            with contextlib.suppress(rpc.grpc.RpcError):
                return await clients.ask()
            await asyncio.sleep(0.05)


async def serve(clients: Clients | Probe) -> None:
    await ready(clients)
    gc.freeze()
    print(json.dumps({"ready": True}), flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps(await clients.run(json.loads(line))), flush=True)


async def main(kind: str, *addresses: str) -> None:
    await serve(Probe(*addresses) if kind == "probe" else Clients(*addresses))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
