"""One pool of OpenMP threads in a worker: the thread that steps its engine loads it too. And signals meanwhile."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
from service import Process, fresh, running_service, wait_until
from transformers import LlamaConfig

# OpenMP's own threads, besides the one that starts a parallel region: more than all else that comes and goes.
EXTRA = 7
PROMPT = "Once upon a time there was a dog. " * 30


def threads_of(pid: int) -> int:
    return sum(1 for _ in Path(f"/proc/{pid}/task").iterdir())


def test_a_worker_that_has_served_has_one_pool_of_threads(tmp_path: Path) -> None:
    """Both roles, embeddings, and KV that is quantized: of two workers that differ by engine.threads alone."""
    engine = {"kv_memory_mib": 32}
    with running_service(
        tmp_path, prefill=0, decode=0, engine=engine, worker={"wire_dtype": "int8"}, router={"transport": "grpc"}
    ) as service:
        counts = {}
        for threads in (1, 1 + EXTRA):
            names = {role: f"{role}-{threads}" for role in ("prefill", "decode")}
            workers = [service.start_worker(names[role], role, engine={"threads": threads}) for role in names]
            service.wait_joined(2)
            assert service.client.complete(PROMPT, max_tokens=8).text
            assert service.client.embed(PROMPT)
            counts[threads] = [threads_of(worker.pid) for worker in workers]
            for worker in workers:
                del service.processes[worker.name]
                worker.stop()
            service.wait_joined(0)
    for one, many in zip(counts[1], counts[1 + EXTRA], strict=True):
        # torch.set_num_threads itself makes as many, in a pool that is not of OpenMP: they sleep for ever.
        assert 2 * EXTRA <= many - one < 3 * EXTRA, counts


def test_ctrl_c_while_the_model_loads_ends_a_worker_at_once(tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=200_000, hidden_size=1024, num_hidden_layers=1, architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path)
    arguments = ("--router", "127.0.0.1:1", "--config", str(tmp_path / "worker.json"))
    (tmp_path / "worker.json").write_text(f'{{"model": {{"path": "{tmp_path}", "load_format": "dummy"}}}}')
    process = Process("loading", "decode_worker", *arguments, launch=fresh)
    try:
        # Half of the first matrix of weights, besides what torch takes.
        wait_until(lambda: psutil.Process(process.pid).memory_info().rss > 700 << 20, 60, "loading")
        process.send(signal.SIGINT)
        assert process.wait_exit(10) == 130
        assert "Traceback" not in process.output
        assert "ready" not in process.output
    finally:
        process.stop()
