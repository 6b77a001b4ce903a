"""`tandem serve --ray`, `tandem scale` and `tandem down` on a real Ray cluster of one node."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from ray_head import RayHead, environment, free_ports, ray_head
from service import ROOT, wait_until

import tandem
from tandem.client import ServiceStatus
from tandem.errors import TandemError

PROMPT, ANSWER = "The color of dog", " can vary widely"
# A killed actor is up again after seconds on an idle machine.
BACK_S = 60.0


class RayService:
    """One prefill and one decode worker, and the commands that change them."""

    def __init__(self, head: RayHead, folder: Path) -> None:
        self.head = head
        self.port, self.http_port = free_ports(2)
        self._config = folder / "service.json"
        self.configure(kv_memory_mib=32)

    def configure(self, worker: dict[str, str] | None = None, **engine: int) -> None:
        settings = {
            "engine": {"threads": 1, **engine},
            "router": {"port": self.port, "http_port": self.http_port, "transport": "ray"},
            "worker": worker or {},
        }
        self._config.write_text(json.dumps(settings))

    def serve(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.head.tandem("serve", "--ray", "--config", str(self._config), *words)

    def scale(self, *words: str) -> None:
        ran = self.head.tandem("scale", *words)
        assert ran.returncode == 0, ran.stderr

    @property
    def client(self) -> tandem.Client:
        # As through an ssh tunnel: the router listens on loopback too.
        return tandem.Client(f"127.0.0.1:{self.port}", timeout_s=30)

    def status(self) -> ServiceStatus:
        with self.client as client:
            return client.status(check_integrity=True)

    def worker_pids(self) -> dict[str, int]:
        """By worker id."""
        return {worker.worker_id: worker.pid for worker in self.status().workers}

    def router_pid(self) -> int:
        return next(
            found.pid
            for found in psutil.net_connections("tcp")
            if found.laddr.port == self.port and found.status == psutil.CONN_LISTEN and found.pid
        )

    def pids(self) -> set[int]:
        return {self.router_pid(), *self.worker_pids().values()}

    def answers(self) -> bool:
        try:
            with self.client as client:
                return client.complete(PROMPT, timeout_s=5).text == ANSWER
        except TandemError:
            return False


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    with ray_head(prefill=2, decode=2) as head:
        yield head


@pytest.fixture(scope="module")
def service(head: RayHead, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayService]:
    service = RayService(head, tmp_path_factory.mktemp("service"))
    ran = service.serve("--wait", "100")
    assert ran.returncode == 0, ran.stderr
    door = rf"OpenAI API at http://\1:{service.http_port}/v1"
    assert re.search(rf"ready at (\S+):{service.port}: model tiny, 1 prefill \+ 1 decode; {door}\n$", ran.stdout)
    yield service
    assert head.tandem("down").returncode == 0


def killed(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not psutil.pid_exists(pid), 10, f"the end of {pid}")


def test_tokens_are_exact(service: RayService) -> None:
    with service.client as client:
        answer = client.complete(PROMPT)
    assert answer.text == ANSWER
    report = answer.choices[0].report
    assert report.transport == "ray"
    assert report.kv_bytes > 0


def test_kv_crosses_through_ray(service: RayService) -> None:
    def moved() -> tuple[int, int]:
        loads = [worker.load for worker in service.status().workers]
        return sum(each.kv_sent["ray"].bytes for each in loads), sum(each.kv_received["ray"].bytes for each in loads)

    with service.client as client:
        client.complete(list(range(3, 200)), max_tokens=2)
    wait_until(lambda: min(moved()) > 0, 5, "heartbeats that tell of bytes sent and received by ray")
    assert all(set(worker.transports) == {"grpc", "ray", "shm"} for worker in service.status().workers)


def test_the_same_call_again_changes_nothing(service: RayService) -> None:
    before = service.pids()
    ran = service.serve()
    assert (ran.returncode, ran.stderr) == (0, "")
    assert service.pids() == before


@contextmanager
def under_load(service: RayService) -> Iterator[Callable[[int], None]]:
    """Yields what waits for so many further answers. No request may fail inside."""
    stop, done, failures = threading.Event(), [0], []

    def ask(seed: int) -> None:
        chance = random.Random(seed)
        with service.client as client:
            while not stop.is_set():
                ids = [chance.randrange(3, 1500) for _ in range(chance.randrange(1, 200))]
                try:
                    client.complete(ids, max_tokens=chance.randrange(1, 60), ignore_eos=True)
                    done[0] += 1
                except TandemError as error:
                    failures.append(str(error))

    def answered(count: int) -> None:
        reached = done[0]
        wait_until(lambda: done[0] > reached + count, 30, "load on the service")

    with ThreadPoolExecutor(4) as threads:
        try:
            asking = [threads.submit(ask, seed) for seed in range(4)]
            yield answered
        finally:
            stop.set()
        for each in asking:
            each.result()
    assert failures == []


def test_it_grows_and_shrinks_under_load_without_a_failed_request(service: RayService) -> None:
    before = service.pids()
    with under_load(service) as answered:
        service.scale("prefill=2", "decode=2")
        grown = service.pids()
        answered(20)
        service.scale("prefill=1", "decode=1")
        answered(5)
    assert len(grown) == 5
    assert grown > before
    # The highest index left; whoever was first stays.
    assert service.pids() == before
    assert not [pid for pid in grown - before if psutil.pid_exists(pid)]


def test_a_killed_worker_comes_back(service: RayService) -> None:
    before = service.worker_pids()
    victim = next(pid for name, pid in before.items() if name.startswith("decode"))
    killed(victim)
    wait_until(lambda: len(service.worker_pids()) == 2 and victim not in service.pids(), BACK_S, "a new decode worker")
    assert service.answers()


def test_a_killed_router_comes_back_at_its_address(service: RayService) -> None:
    workers, router = service.worker_pids(), service.router_pid()
    killed(router)
    wait_until(service.answers, BACK_S, "an answer of the new router")
    assert service.router_pid() != router
    assert service.worker_pids() == workers


def test_changed_settings_replace_the_workers_alone_one_of_each_pool_at_a_time(service: RayService) -> None:
    service.scale("prefill=2", "decode=2")
    workers, router = set(service.worker_pids().values()), service.router_pid()
    service.configure(kv_memory_mib=48)
    with under_load(service) as answered:
        ran = service.serve("--prefill", "2", "--decode", "2")
        answered(5)
    assert ran.returncode == 0, ran.stderr
    drained = [line for line in ran.stderr.splitlines() if line.startswith("draining")]
    assert drained == ["draining prefill-0, decode-0", "draining prefill-1, decode-1"]
    assert service.router_pid() == router
    assert len(service.worker_pids()) == 4
    assert not workers & set(service.worker_pids().values())
    assert {worker.total_blocks for worker in service.status().workers} == {1536}
    service.scale("prefill=1", "decode=1")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("scale", "speed=3"), "there is no pool 'speed'; pools are prefill, decode, colocated"),
        (("scale", "prefill=-1"), "prefill takes a number of workers, such as prefill=2, not '-1'"),
        (("scale", "prefill=100000"), "config key serve.prefill: input should be less than or equal to 64, not 100000"),
        (("scale", "decode=0"), "nobody would play decode: serve.decode is 0"),
    ],
)
def test_what_cannot_be_is_refused(service: RayService, words: tuple[str, ...], message: str) -> None:
    ran = service.head.tandem(*words)
    assert (ran.returncode, ran.stderr) == (2, f"tandem: {message}\n")


def test_a_pool_without_nodes_is_named_and_what_served_stays(service: RayService) -> None:
    before = service.pids()
    ran = service.head.tandem("scale", "prefill=3", "colocated=1", "--wait", "6")
    assert ran.returncode == 1
    last = ran.stderr.splitlines()[-1]
    assert "1 of 3 prefill workers found no node with a free `prefill` resource" in last
    assert "1 of 1 colocated workers found no node with a free `colocated` resource" in last
    assert "(the cluster's nodes offer prefill 2, decode 2)" in last
    assert service.pids() >= before
    service.scale("prefill=1")
    assert service.pids() == before


def test_settings_that_cannot_work_bring_back_what_served(service: RayService) -> None:
    before = service.worker_pids()
    blocks = {worker.total_blocks for worker in service.status().workers}
    service.configure(worker={"host": "192.0.2.77"}, kv_memory_mib=16)
    ran = service.serve()
    assert ran.returncode == 2
    assert re.search(r"cannot serve on node [0-9.]+: worker.host .*192.0.2.77", ran.stderr), ran.stderr
    assert "starting again what served before: decode-0, prefill-0" in ran.stderr
    wait_until(service.answers, BACK_S, "the workers of before")
    assert not set(before.values()) & set(service.worker_pids().values())
    assert {worker.total_blocks for worker in service.status().workers} == blocks


def test_a_command_that_is_told_to_end_takes_back_what_it_began(service: RayService) -> None:
    before = service.pids()
    waiting = subprocess.Popen(
        [sys.executable, "-m", "tandem.cli.main", "scale", "colocated=1", "--address", service.head.address],
        env=environment(service.head.token),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    with waiting:
        assert waiting.stderr is not None
        assert next(line for line in waiting.stderr if "waiting for colocated-0" in line)
        waiting.send_signal(signal.SIGTERM)
        assert waiting.wait(60) == 128 + signal.SIGTERM
    assert service.pids() == before
    assert "nothing" not in service.head.tandem("scale", "prefill=1").stderr
    assert service.pids() == before


def test_another_token_is_refused(service: RayService) -> None:
    ran = service.head.tandem("down", token="0" * 32)
    assert ran.returncode == 1
    assert "refuses this user's token" in ran.stderr
    assert service.answers()


def test_another_version_of_ray_is_refused(service: RayService) -> None:
    other = "import ray; ray.__version__ = '2.59.0'; import tandem.cli.main as m; m.main()"
    ran = subprocess.run(
        [sys.executable, "-c", other, "scale", "prefill=1", "--address", service.head.address],
        env=environment(service.head.token),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 1
    assert re.fullmatch(r"tandem: cannot join the Ray cluster at .*2\.60\.0.*2\.59\.0.*\n", ran.stderr), ran.stderr
    assert service.answers()


def test_down_leaves_nothing(service: RayService) -> None:
    assert service.status().problems() == []
    pids = service.pids()
    ran = service.head.tandem("down")
    assert (ran.returncode, ran.stdout) == (0, "stopped\n")
    wait_until(lambda: not [pid for pid in pids if psutil.pid_exists(pid)], 10, "the end of every member")
    assert service.head.tandem("down").stdout == "nothing is running\n"
    ran = service.head.tandem("scale", "prefill=2")
    assert ran.returncode == 1
    assert "nothing is served on this cluster" in ran.stderr
    code = "import ray, sys; ray.init(sys.argv[1], namespace='tandem'); print(ray.util.list_named_actors())"
    left = subprocess.run(
        [sys.executable, "-c", code, service.head.address],
        env={**environment(service.head.token), "RAY_AUTH_MODE": "token"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert left.stdout == "[]\n", left.stderr
