"""The launcher file for own machines, on three hosts: Ray's real `ray up`, Tandem on top, `ray down`, and nothing left.

The tests of this file run in order, on one cluster: the head with the router and a decode worker, host `one` with a
prefill worker, host `two` with a decode worker. So all KV of requests that host `two` decodes has crossed hosts, and
what the head decodes has too.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from hosts import Host
from onprem import OnPremCluster, left_running, onprem_cluster
from service import ROOT, running_service, wait_until

import tandem
from tandem.client.status import WorkerState
from tandem.types import RequestReport

pytestmark = pytest.mark.timeout(400)

PROMPTS = [
    "The color of dog",
    "The capital of France is",
    "Today's weather is so",
    "Once upon a time",
    "Once upon a time there was a little rabbit who lived near the river. " * 12,
]
MAX_TOKENS = 24
# Small engines: six processes of Ray and four of Tandem share a machine of two cores.
SETTINGS = "engine: {{threads: 1, kv_memory_mib: 32}}\nrouter: {{transport: {transport}}}\n"
# The router's own bound, which the issue sets: heartbeat_timeout_s and the registry's look at it.
OUT_OF_ROUTING_S = 5.0
PORT = 8700


@pytest.fixture(scope="module")
def cluster() -> Iterator[OnPremCluster]:
    with onprem_cluster() as cluster:
        yield cluster


def serve(cluster: OnPremCluster, transport: str = "auto") -> str:
    """The documented command, with a configuration that the documented way brought to the head."""
    file = cluster.network.folder / "service.yaml"
    file.write_text(SETTINGS.format(transport=transport))
    cluster.ray("rsync-up", str(cluster.file), str(file), "~/service.yaml")
    return cluster.exec("tandem serve --ray --prefill 1 --decode 2 --config ~/service.yaml")


@pytest.fixture(scope="module")
def client(cluster: OnPremCluster) -> Iterator[tandem.Client]:
    """Of the service on the cluster, from outside of it."""
    assert f"ready at {cluster.head.address}:{PORT}: model tiny, 1 prefill + 2 decode" in serve(cluster)
    with tandem.Client(f"{cluster.head.address}:{PORT}") as client:
        yield client


def workers(client: tandem.Client) -> dict[str, WorkerState]:
    """By the address of their host; the prefill worker, and one decode worker on each of two hosts."""
    return {worker.address.rpartition(":")[0]: worker for worker in client.status().workers}


def answers(client: tandem.Client, salt: str = "") -> list[tuple[list[int], str]]:
    """Token ids and text of every prompt, asked at once; greedy, and seeded. Another salt finds nothing cached."""

    def ask(prompt: str, temperature: float = 0, seed: int | None = None) -> tuple[list[int], str]:
        sampling = tandem.SamplingParams(max_tokens=MAX_TOKENS, temperature=temperature, seed=seed)
        choice = client.complete(prompt, sampling=sampling, cache_salt=salt, timeout_s=60).choices[0]
        return [token.id for token in choice.tokens], choice.text

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        greedy = list(pool.map(ask, PROMPTS))
        seeded = list(pool.map(lambda prompt: ask(prompt, temperature=0.9, seed=11), PROMPTS))
    return greedy + seeded


def report_of(client: tandem.Client, prompt: str = PROMPTS[0]) -> RequestReport:
    return client.complete(prompt, max_tokens=4, timeout_s=30).choices[0].report


def reports_on(client: tandem.Client, worker_id: str, count: int) -> list[RequestReport]:
    """Reports of requests that this decode worker served; others are asked for and passed over."""
    found: list[RequestReport] = []

    def enough() -> bool:
        with ThreadPoolExecutor(6) as pool:
            reports = list(pool.map(lambda number: report_of(client, f"Story {number}: {PROMPTS[3]}"), range(6)))
        found.extend(report for report in reports if report.decode_worker == worker_id)
        return len(found) >= count

    wait_until(enough, 60, f"{count} requests on {worker_id}")
    return found


def test_every_node_has_its_pool(cluster: OnPremCluster) -> None:
    nodes = cluster.python_on_head("""
        ray.init(address="auto", log_to_driver=False)
        for node in ray.nodes():
            pools = {pool: count for pool, count in node["Resources"].items() if pool in ("prefill", "decode")}
            print("node", node["NodeManagerAddress"], pools, node["Labels"].get("pool"))
    """)
    addresses = {name: host.address for name, host in cluster.nodes.items()}
    assert {line for line in nodes.splitlines() if line.startswith("node ")} == {
        f"node {addresses['head']} {{'decode': 1.0}} None",
        f"node {addresses['one']} {{'prefill': 1.0}} prefill",
        f"node {addresses['two']} {{'decode': 1.0}} decode",
    }


def test_who_has_no_token_is_refused(cluster: OnPremCluster) -> None:
    """From a machine of the same network, with Ray installed."""
    asks = f"ray status --address {cluster.head.address}:6379"
    assert "prefill" in cluster.laptop.run("bash", "-c", f"RAY_AUTH_MODE=token {asks}")
    for wrong in ("RAY_AUTH_MODE=disabled", "RAY_AUTH_MODE=token RAY_AUTH_TOKEN=0123456789abcdef0123456789abcdef"):
        refused = cluster.laptop.run("bash", "-c", f"{wrong} {asks}", check=False)
        assert "prefill" not in refused
        assert "nauthenticated" in refused, refused


@pytest.mark.parametrize("call", ["8080/get_or_create_runtime_env", "52365/api/job_agent/jobs/"])
def test_agents_that_can_run_programs_ask_for_the_token(cluster: OnPremCluster, call: str) -> None:
    request = urllib.request.Request(f"http://{cluster.head.address}:{call}", data=b"{}", method="POST")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=10)
    with refused.value:
        assert refused.value.code in (401, 403)


def test_dashboard_listens_on_loopback_only(cluster: OnPremCluster) -> None:
    listening = cluster.head.run("ss", "-Hltn", "sport = :8265").split()
    assert "127.0.0.1:8265" in listening
    assert not [address for address in listening if address.endswith(":8265") and address != "127.0.0.1:8265"]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[list[int], str]]:
    """What a service on a single machine answers."""
    with running_service(tmp_path_factory.mktemp("single")) as single:
        return answers(single.client)


def test_the_first_answer(client: tandem.Client) -> None:
    answer = client.complete("The color of dog", max_tokens=MAX_TOKENS)
    assert (answer.text, answer.choices[0].reason.value) == (" can vary widely", "stop")


def test_the_pools_are_on_their_hosts(cluster: OnPremCluster, client: tandem.Client) -> None:
    roles = {address: {role.value for role in worker.roles} for address, worker in workers(client).items()}
    assert roles == {
        cluster.head.address: {"decode"},
        cluster.nodes["one"].address: {"prefill"},
        cluster.nodes["two"].address: {"decode"},
    }


def test_a_second_serve_changes_nothing(cluster: OnPremCluster, client: tandem.Client) -> None:
    before = {address: worker.pid for address, worker in workers(client).items()}
    serve(cluster)
    assert {address: worker.pid for address, worker in workers(client).items()} == before


def test_the_sdk_on_a_laptop_reaches_it_through_ssh(cluster: OnPremCluster, client: tandem.Client) -> None:
    """As docs/cluster.md says: `ray attach FILE -p 8700` forwards the port, and the SDK talks to loopback."""
    laptop = cluster.laptop
    ask = "tandem generate 'The color of dog'"
    assert laptop.run("bash", "-c", ask, check=False).count("vary widely") == 0, "the laptop has a router of its own"
    with port_forwarded(cluster):
        wait_until(lambda: f":{PORT}" in laptop.run("ss", "-Hltn"), 30, "the forwarded port")
        assert laptop.run("bash", "-c", ask).strip() == "can vary widely"


@contextmanager
def port_forwarded(cluster: OnPremCluster) -> Iterator[None]:
    # `script` gives it the terminal that a person has, who leaves by `exit`. Without that the head's shell stays where
    # this process ignores SIGHUP, as under nohup: everything that is started here then does too.
    attach = f"ray attach {cluster.file} -p {PORT}"
    with cluster.laptop.start_process("script", "-qfc", attach, "/dev/null", cwd=ROOT) as process:
        try:
            yield
            assert process.stdin is not None
            process.stdin.write(b"exit\n")
            process.stdin.flush()
            process.wait(30)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("transport", ["grpc", "ray"])
def test_kv_crosses_hosts_and_tokens_are_those_of_one_machine(
    cluster: OnPremCluster, client: tandem.Client, expected: list[tuple[list[int], str]], transport: str
) -> None:
    """Another transport is another router: the workers stay."""
    pids = {address: worker.pid for address, worker in workers(client).items()}
    serve(cluster, transport)
    before = workers(client)
    assert {address: worker.pid for address, worker in before.items()} == pids
    assert answers(client, salt=transport) == expected
    two = before[cluster.nodes["two"].address]
    reports = reports_on(client, two.worker_id, 3)
    assert {report.transport for report in reports} == {transport}
    assert all(report.kv_bytes > 0 for report in reports)
    one = cluster.nodes["one"].address
    for address, side in ((one, "kv_sent"), (two.address.rpartition(":")[0], "kv_received")):
        moved = wait_until(lambda: moved_since(client, before, address, side), 5, f"{side} of {address}")  # noqa: B023
        assert set(moved) == {transport}


def moved_since(client: tandem.Client, before: dict[str, WorkerState], address: str, side: str) -> dict[str, int]:
    """Bytes by transport, of those by which any moved."""
    now, then = getattr(workers(client)[address].load, side), getattr(before[address].load, side)
    grown = {name: traffic.bytes - (then[name].bytes if name in then else 0) for name, traffic in now.items()}
    return {name: count for name, count in grown.items() if count}


def test_a_killed_worker_is_back(cluster: OnPremCluster, client: tandem.Client) -> None:
    serve(cluster)
    two = cluster.nodes["two"]
    before = workers(client)[two.address]
    actor = [pid for pid, line in two.processes().items() if "MemberActor" in line]
    assert len(actor) == 1
    two.run("kill", "-KILL", str(before.pid))
    wait_until(lambda: actor[0] not in two.processes(), 5, "the worker's end")
    after = wait_until(lambda: is_new(client, two, before.pid), 60, "a new worker on host two")
    assert reports_on(client, after.worker_id, 2)
    wait_idle(client)


def is_new(client: tandem.Client, host: Host, old_pid: int) -> WorkerState | None:
    found = workers(client).get(host.address)
    return found if found is not None and found.pid != old_pid else None


def wait_idle(client: tandem.Client) -> None:
    def idle() -> bool:
        status = client.status(check_integrity=True)
        return status.live_requests == 0 and status.problems() == []

    wait_until(idle, 20, "a service without orphans")


class Traffic:
    """Short requests, one after the other, from several threads until told to stop."""

    def __init__(self, client: tandem.Client, threads: int = 3) -> None:
        # (started, ended, decode worker or the error's name)
        self.log: list[tuple[float, float, str]] = []
        self._client = client
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(threads)]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _ask(self) -> None:
        while not self._stop.is_set():
            started = time.monotonic()
            try:
                outcome = report_of(self._client).decode_worker
            except tandem.TandemError as error:
                outcome = type(error).__name__
            self.log.append((started, time.monotonic(), outcome))


def test_a_host_that_is_cut_off_leaves_routing_and_comes_back(cluster: OnPremCluster, client: tandem.Client) -> None:
    two = cluster.nodes["two"]
    found = workers(client)
    cut_off, other = found[two.address].worker_id, found[cluster.head.address].worker_id
    with Traffic(client) as traffic:
        wait_until(lambda: {outcome for *_, outcome in traffic.log} >= {cut_off, other}, 30, "traffic on both hosts")
        two.cut()
        cut_at = time.monotonic()
        assert not cluster.head.reaches(two), "the link is not cut"
        wait_until(lambda: two.address not in workers(client), 30, "the host to leave routing")
        out_at = time.monotonic()
        wait_until(lambda: sum(ended > out_at + 2 for _, ended, _ in traffic.log) > 10, 30, "traffic without it")
    assert out_at - cut_at < OUT_OF_ROUTING_S
    # While it was still in routing, the other host went on; afterwards nothing failed.
    meanwhile = [outcome for started, ended, outcome in traffic.log if started > cut_at and ended < out_at]
    assert other in meanwhile
    assert {outcome for started, _, outcome in traffic.log if started > out_at} == {other}
    assert len(workers(client)) == 2
    two.mend()
    wait_until(lambda: two.address in workers(client), 30, "the host to come back")
    assert reports_on(client, workers(client)[two.address].worker_id, 2)
    wait_idle(client)


def test_tandem_down_ends_the_service(cluster: OnPremCluster, client: tandem.Client) -> None:
    assert "stopped" in cluster.exec("tandem down")
    with pytest.raises(tandem.Unavailable):
        client.status()
    assert [line for host in cluster.nodes.values() for line in left_running(host) if "MemberActor" in line] == []


def test_down_leaves_nothing(cluster: OnPremCluster) -> None:
    cluster.down()
    try:
        wait_until(lambda: not any(map(left_running, cluster.nodes.values())), 20, "the end of all that Ray started")
    except AssertionError:
        pytest.fail(f"still running: { {name: left_running(host) for name, host in cluster.nodes.items()} }")
    assert [host.run("ls", "-A", "/dev/shm") for host in cluster.nodes.values()] == [""] * 3
