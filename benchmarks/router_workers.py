"""A prefill worker and a decode worker without a model, for router.py and overload.py; a process of its own.

    router_workers.py ROUTER        each line {"step_s": ..., "prefill_s": ..., "row_s": ...} on stdin sets the pace

Their answers cost next to nothing: the first token after prefill_s, one prompt after the other (at once if it is 0 or
not said), then one token a step for every live request, all of a step in one message, as a real decode worker sends it.
A step takes step_s, and row_s (0 if not said) more for each live request. One request in 16 carries in its log
probabilities when each token was sent; the client reads the same clock.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

import tandem
from tandem import rpc, wire
from tandem.config import TINY_MODEL
from tandem.types import Fingerprint, FinishReason, ModelInfo, Role
from tandem.v1 import common_pb2, registry_pb2, registry_pb2_grpc, worker_pb2, worker_pb2_grpc

SENTENCE = (
    "The router hands tokens of many requests from the workers to their clients, as fast as the workers make them; "
)
TOTAL_BLOCKS = 1 << 20
HEARTBEAT_S = 0.5
STAMPED = 16
LENGTH = wire.reason_to_wire(FinishReason.LENGTH)


@dataclass
class Live:
    request_id: str
    attempt: int
    max_tokens: int
    stamped: bool
    position: int = 1


class Workers(worker_pb2_grpc.PrefillWorkerServicer, worker_pb2_grpc.DecodeWorkerServicer):
    """Both workers' services: what one seals, the other decodes."""

    def __init__(self, output: list[int]) -> None:
        self.step_s, self.prefill_s, self.row_s = 0.01, 0.0, 0.0
        self._prefilling = asyncio.Lock()
        self._output = output
        self._reserved: dict[str, Live] = {}
        self._live: dict[str, Live] = {}
        self._wake = asyncio.Event()
        self._count = 0
        self._closing = False

    def close(self) -> None:
        """Ends the token streams."""
        self._closing = True
        self._wake.set()

    async def Reserve(self, request: worker_pb2.ReserveRequest, _context: Any) -> worker_pb2.Reservation:
        asked = request.request
        self._count += 1
        live = Live(asked.request_id, asked.attempt, asked.sampling.max_tokens, self._count % STAMPED == 0)
        self._reserved[asked.request_id] = live
        return worker_pb2.Reservation(reservation_id=asked.request_id)

    async def Renew(self, _request: worker_pb2.RenewRequest, _context: Any) -> worker_pb2.RenewResponse:
        return worker_pb2.RenewResponse()

    async def Abort(self, request: worker_pb2.AbortRequest, _context: Any) -> worker_pb2.AbortResponse:
        self._reserved.pop(request.request_id, None)
        self._live.pop(request.request_id, None)
        return worker_pb2.AbortResponse()

    async def Prefill(self, request: worker_pb2.PrefillRequest, context: Any) -> None:
        live = self._reserved.pop(request.target.reservation_id)
        await context.write(worker_pb2.PrefillEvent(started=worker_pb2.PrefillStarted()))
        if self.prefill_s:
            async with self._prefilling:
                await asyncio.sleep(self.prefill_s)
        first = worker_pb2.FirstToken(token=common_pb2.Token(id=self._output[0]))
        if live.max_tokens == 1:
            first.finish_reason = LENGTH
        await context.write(worker_pb2.PrefillEvent(first_token=first))
        if live.max_tokens > 1:
            self._live[live.request_id] = live
            self._wake.set()
            await context.write(worker_pb2.PrefillEvent(sealed=worker_pb2.Sealed()))

    async def Subscribe(self, _request: worker_pb2.SubscribeRequest, context: Any) -> None:
        await context.send_initial_metadata(())
        due_s = time.monotonic()
        while not self._closing:
            if not self._live:
                self._wake.clear()
                await self._wake.wait()
                due_s = time.monotonic()
                continue
            await context.write(self._step())
            # A step that comes late does not make the next ones come sooner.
            due_s = max(due_s + self.step_s + self.row_s * len(self._live), time.monotonic())
            await asyncio.sleep(due_s - time.monotonic())

    def _step(self) -> worker_pb2.TokenBatch:
        batch, now_s, ended = worker_pb2.TokenBatch(), time.monotonic(), []
        for live in self._live.values():
            position = live.position
            message = batch.requests.add(request_id=live.request_id, attempt=live.attempt, position=position)
            token = message.tokens.add(id=self._output[position % len(self._output)])
            if live.stamped:
                token.logprob = now_s
            live.position += 1
            if live.position == live.max_tokens:
                message.finish_reason = LENGTH
                ended.append(live.request_id)
        for request_id in ended:
            del self._live[request_id]
        return batch


async def join(router: str, worker_id: str, role: Role, port: int, vocab_size: int) -> None:
    model = ModelInfo(TINY_MODEL.name, vocab_size, 4096, (0,), Fingerprint("c", "w", "float32", 16, 2, 2, 8, 1), 128)
    hello = registry_pb2.Hello(
        worker_id=worker_id,
        address=f"127.0.0.1:{port}",
        roles=wire.roles_to_wire(frozenset([role])),
        model=wire.model_to_wire(model),
        version=tandem.__version__,
        total_blocks=TOTAL_BLOCKS,
        transports=[registry_pb2.Transport(name="grpc")],
    )
    async with rpc.make_channel(router) as channel:
        call = registry_pb2_grpc.RegistryStub(channel).Join()
        while True:
            await call.write(registry_pb2.Heartbeat(hello=hello, load=registry_pb2.Load(free_blocks=TOTAL_BLOCKS)))
            hello = None
            await asyncio.sleep(HEARTBEAT_S)


async def serve(router: str) -> None:
    tokenizer = Tokenizer.from_file(str(TINY_MODEL / "tokenizer.json"))
    workers = Workers(tokenizer.encode(SENTENCE, add_special_tokens=False).ids)
    server = rpc.make_server()
    worker_pb2_grpc.add_PrefillWorkerServicer_to_server(workers, server)
    worker_pb2_grpc.add_DecodeWorkerServicer_to_server(workers, server)
    port = rpc.bind(server, "127.0.0.1", 0)
    await server.start()
    joins = [
        asyncio.create_task(join(router, worker_id, role, port, tokenizer.get_vocab_size()))
        for worker_id, role in (("prefill", Role.PREFILL), ("decode", Role.DECODE))
    ]
    print(json.dumps({"port": port}), flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        pace = json.loads(line)
        workers.step_s, workers.prefill_s = pace["step_s"], pace.get("prefill_s", 0.0)
        workers.row_s = pace.get("row_s", 0.0)
        print(json.dumps({}), flush=True)
    for task in joins:
        task.cancel()
    workers.close()
    await server.stop(1)


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
