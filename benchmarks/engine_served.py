"""Another side of benchmarks/engine.py: the same cases as a client of the whole service sees them.

Router and worker are processes, as `tandem serve --colocated 1` starts them; this process is the client. Prefill rate:
BATCH*INPUT / time from sending until every prompt has its first token. Decode rate: BATCH / median time between two
tokens of an answer, while all answers get tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from itertools import pairwise

from tandem.client import AsyncClient
from tandem.config import TandemConfig, parse_config
from tandem.launch.processes import Supervisor
from tandem.types import Delta, SamplingParams

SERVICE = {"router": {"port": 0, "http_port": -1}, "serve": {"prefill": 0, "decode": 0, "colocated": 1}}


async def arrivals(client: AsyncClient, prompt: list[int], output: int) -> list[float]:
    """When each token came."""
    sampling, times = SamplingParams(max_tokens=output, ignore_eos=True), []
    async for event in client.generate(prompt, sampling=sampling):
        if isinstance(event, Delta):
            times += [time.perf_counter()] * len(event.tokens)
    return times


async def answer(client: AsyncClient, vocab_size: int, case: str) -> dict[str, float]:
    batch, given, output = map(int, case.split("x"))
    prompts = [[random.randrange(5, min(vocab_size, 8000)) for _ in range(given)] for _ in range(batch)]
    started = time.perf_counter()
    came = await asyncio.gather(*(arrivals(client, prompt, output) for prompt in prompts))
    all_began, one_ended = max(times[0] for times in came), min(times[-1] for times in came)
    steps = [
        later - earlier for times in came for earlier, later in pairwise(times) if all_began <= earlier < one_ended
    ]
    row = {"prefill_tok_s": batch * given / (all_began - started)}
    if steps:
        row["decode_tok_s"] = batch / statistics.median(steps)
    return row


async def serve(config: TandemConfig) -> None:
    supervisor = Supervisor(config, output=None)
    await supervisor.start()
    try:
        async with AsyncClient(supervisor.address) as client:
            vocab_size = (await client.models())[0].vocab_size
            for warm_up in ("2x64x4", "1x1024x1", "8x512x1"):
                await answer(client, vocab_size, warm_up)
            print(json.dumps({"ready": {}}), flush=True)
            while line := await asyncio.to_thread(sys.stdin.readline):
                print(json.dumps(await answer(client, vocab_size, line.strip())), flush=True)
    finally:
        await supervisor.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", help="JSON of the configuration's sections")
    asyncio.run(serve(parse_config({**json.loads(parser.parse_args().settings), **SERVICE})))


if __name__ == "__main__":
    main()
