"""One side of benchmarks/engine.py: Tandem's engine in a process of its own, fed with cases on stdin.

A case is BATCHxINPUTxOUTPUT; the answer is one JSON line. Prefill rate: BATCH*INPUT / time until every prompt has its
first token. Decode rate: BATCH / median time of a step in which every sequence, and nothing else, got a token.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import threading
import time
from collections.abc import Iterator

import torch
from roofs import measure_roofs

from tandem.config import TandemConfig, parse_config
from tandem.engine.backends.backend import tune_process
from tandem.engine.engine import Emission, Engine
from tandem.engine.sequence import Failed, NewToken, Sequence
from tandem.types import EngineRequest, SamplingParams


class Bench:
    def __init__(self, config: TandemConfig) -> None:
        self._emissions: list[Emission] = []
        # Prompts without a first token.
        self._first_left = 0
        self._engine = Engine(config, self._publish)
        self._vocab = self._engine.info.vocab_size

    def answer(self, case: str) -> dict[str, float]:
        batch, given, output = map(int, case.split("x"))
        for sequence in self._sequences(batch, given, output):
            self._engine.add(sequence)
        row: dict[str, float] = {}
        steps = []
        started = time.perf_counter()
        while self._engine.has_work:
            before, self._emissions = time.perf_counter(), []
            self._engine.step()
            now = time.perf_counter()
            events = [event for _, event in self._emissions]
            if not row and sum(isinstance(e, NewToken) and e.position == 0 for e in events) == self._first_left:
                row["prefill_tok_s"] = batch * given / (now - started)
            elif len(events) == batch and all(isinstance(e, NewToken) and e.position > 0 for e in events):
                steps.append(now - before)
            self._first_left -= sum(isinstance(e, NewToken) and e.position == 0 for e in events)
        if steps:
            row["decode_tok_s"] = batch / statistics.median(steps)
        return row

    def facts(self) -> dict[str, float]:
        """What the roofs of a case are computed from."""
        info = self._engine.info.fingerprint
        itemsize = self._engine.cache.pool.itemsize
        return {"kv_bytes_per_token": 2 * info.num_layers * info.num_kv_heads * info.head_dim * itemsize}

    def _sequences(self, batch: int, given: int, output: int) -> Iterator[Sequence]:
        self._first_left = batch
        params = SamplingParams(max_tokens=output, ignore_eos=True)
        for index in range(batch):
            prompt = tuple(random.randrange(5, min(self._vocab, 8000)) for _ in range(given))
            request = EngineRequest(str(index), prompt, params)
            table = self._engine.reserve(request, prefill_here=True)
            assert table is not None, "the KV pool is too small for this case"
            yield Sequence(request, lambda event: None, decode_here=True, table=table)

    def _publish(self, emissions: list[Emission]) -> None:
        for _, event in emissions:
            if isinstance(event, Failed):
                raise event.error
        self._emissions += emissions


def serve(config: TandemConfig) -> None:
    tune_process(config.engine)
    dtype = torch.bfloat16 if config.engine.device == "cuda" else torch.float32
    bench = Bench(config)
    for warm_up in ("2x64x4", "1x1024x1", "8x512x1"):
        bench.answer(warm_up)
    roofs = measure_roofs(config.engine.device, dtype)
    facts = {**bench.facts(), "read_bytes_s": roofs.read_bytes_s, "flop_s": roofs.flop_s}
    print(json.dumps({"ready": facts}), flush=True)
    for line in sys.stdin:
        print(json.dumps(bench.answer(line.strip())), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", help="JSON of the configuration's sections")
    config = parse_config(json.loads(parser.parse_args().settings))
    # As in a worker: a thread that is not the main one loads the engine and steps it.
    thread = threading.Thread(target=serve, args=(config,))
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
