"""The clients of router.py, in a process of their own.

    router_client.py ROUTER WORKERS        answers each case, a line of JSON on stdin, with two lines: when its
                                           measured time begins, and what was seen in it

A case is a closed loop: each of `streams` callers sends its next request when its last is answered. Beside it runs a
probe, which calls the workers without a router (Reserve, then Prefill up to the first token), one call after another.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from tandem import rpc, wire
from tandem.types import EngineRequest, SamplingParams
from tandem.v1 import generation_pb2, generation_pb2_grpc, worker_pb2, worker_pb2_grpc

PROMPT = "Once upon a time there was a router that stood between many clients and a few workers. " * 4
PROBE_INTERVAL_S = 0.02
READY_S = 20.0


@dataclass
class Seen:
    """Within the measured time; seconds."""

    tokens: int = 0
    deltas: int = 0
    requests: int = 0
    ttft: list[float] = field(default_factory=list)
    probe_ttft: list[float] = field(default_factory=list)
    # From the decode worker's sending of a token to its being here.
    lag: list[float] = field(default_factory=list)


class Clients:
    def __init__(self, router: str, workers: str) -> None:
        self._router: Any = generation_pb2_grpc.GenerationStub(rpc.make_channel(router))
        channel = rpc.make_channel(workers)
        self._prefill: Any = worker_pb2_grpc.PrefillWorkerStub(channel)
        self._decode: Any = worker_pb2_grpc.DecodeWorkerStub(channel)
        self._seen = Seen()
        self._prompt_ids = tuple(range(10, 110))

    async def ready(self) -> None:
        """Returns when the router has workers and answers."""
        async with asyncio.timeout(READY_S):
            while True:
                with contextlib.suppress(rpc.grpc.RpcError):
                    return await self._request(2)
                await asyncio.sleep(0.05)

    async def run(self, case: dict[str, Any]) -> dict[str, Any]:
        """streams, output_tokens, step_s, warm_s, seconds."""
        spread_s = case["output_tokens"] * case["step_s"] / case["streams"]
        tasks = [asyncio.create_task(self._probe())]
        tasks += [
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

    async def _probe(self) -> None:
        number = 0
        while True:
            await asyncio.sleep(PROBE_INTERVAL_S)
            number += 1
            request = wire.request_to_wire(
                EngineRequest(f"probe-{number}", self._prompt_ids, SamplingParams(max_tokens=1))
            )
            started_s = time.monotonic()
            await self._decode.Reserve(worker_pb2.ReserveRequest(request=request))
            target = worker_pb2.TransferTarget(reservation_id=request.request_id)
            call = self._prefill.Prefill(worker_pb2.PrefillRequest(request=request, target=target))
            while (event := await rpc.read(call)) is not None:
                if event.WhichOneof("event") == "first_token":
                    self._seen.probe_ttft.append(time.monotonic() - started_s)


async def serve(router: str, workers: str) -> None:
    clients = Clients(router, workers)
    await clients.ready()
    gc.freeze()
    print(json.dumps({"ready": True}), flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps(await clients.run(json.loads(line))), flush=True)


if __name__ == "__main__":
    asyncio.run(serve(*sys.argv[1:]))
