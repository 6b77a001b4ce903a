"""A flipped bit between real workers: one try more, or one clean error; and what metrics count."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial

import httpx
import psutil
import pytest
from engine_driver import EngineDriver
from links import FlippingLink
from service import START_S, Service, running_service, wait_until

from tandem.config import TINY_MODEL
from tandem.errors import TransferFailed
from tandem.types import RequestReport, SamplingParams

SAMPLING = SamplingParams(max_tokens=12, ignore_eos=True)
# By transport: frames before the seal's answer, and those of them that the receiver sends.
KINDS = {"grpc": ["open", "data", "seal"], "shm": ["open", "mapped", "locked", "granted", "written", "seal"]}
FROM_RECEIVER = ("mapped", "granted")
PAYLOADS = ("data", "written")
# Several data frames of 4 KiB, and a last block that is not full.
PROMPT_TOKENS = 75


@pytest.fixture(scope="module")
def link() -> Iterator[FlippingLink]:
    link = FlippingLink()
    yield link
    link.close()


@pytest.fixture(scope="module", params=KINDS)
def transport(request: pytest.FixtureRequest) -> str:
    """Of first attempts; second ones go by grpc."""
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, link: FlippingLink, transport: str) -> Iterator[Service]:
    """Whoever speaks to the decode worker does so over the link."""
    with running_service(
        tmp_path_factory.mktemp("flips"),
        decode=0,
        wait=False,
        worker={"frame_bytes": 4096, "object_bytes": 4096},
        router={"heartbeat_interval_s": 0.05, "transport": transport},
    ) as service:
        link.cut()
        worker = service.start_worker("decode-0", "decode", worker={"advertise": link.address})
        link.target = wait_until(lambda: listens_at(worker.pid), START_S, "the decode worker's port")
        link.mend()
        service.wait_joined(2)
        yield service


def listens_at(pid: int) -> str:
    listening = [each.laddr for each in psutil.Process(pid).net_connections("tcp") if each.status == psutil.CONN_LISTEN]
    return f"{listening[0].ip}:{listening[0].port}" if listening else ""


@pytest.fixture(scope="module")
def driver() -> EngineDriver:
    return EngineDriver(TINY_MODEL, prefix_cache=False, threads=1)


@pytest.fixture(autouse=True)
def _no_fault_stays(service: Service, link: FlippingLink) -> Iterator[None]:
    yield
    link.flip = lambda kind, size: None
    wait_until(service.idle, 5, "no orphan")


def prompt(name: str) -> list[int]:
    """Of each name another: nothing of it is cached."""
    return random.Random(name).choices(range(3, 1500), k=PROMPT_TOKENS)


def ask(service: Service, prompt: list[int]) -> tuple[list[int], RequestReport]:
    (choice,) = service.client.complete(prompt, sampling=SAMPLING).choices
    return [token.id for token in choice.tokens], choice.report


def metrics(service: Service) -> dict[str, float]:
    lines = httpx.get(f"{service.http}/metrics").text.splitlines()
    pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in pairs}


def retried(service: Service, transport: str) -> float:
    name = f'tandem_retried_attempts_total{{reason="transfer_failed",transport="{transport}"}}'
    return metrics(service).get(name, 0.0)


def kv_counted(service: Service, transport: str, end: str) -> dict[str, float]:
    """Bytes, frames and so on, by name; end: sent or received."""
    labels, found = f'direction="{end}",transport="{transport}"', {}
    for name, value in metrics(service).items():
        if name.startswith("tandem_worker_kv_") and labels in name:
            found[name.partition("{")[0].removeprefix("tandem_worker_kv_").removesuffix("_total")] = value
    return found


def corrupt(service: Service, transport: str) -> tuple[float, float]:
    """What sender and receiver have counted."""
    sent, received = (kv_counted(service, transport, end)["corrupt_frames"] for end in ("sent", "received"))
    return sent, received


@pytest.mark.parametrize("bit", [3, 77, 500, -1], ids=["magic", "checksum", "header", "end"])
def test_one_flip_is_retried_once_with_the_same_tokens(
    service: Service, link: FlippingLink, driver: EngineDriver, transport: str, bit: int
) -> None:
    for kind in KINDS[transport]:
        before, (sent, received) = retried(service, transport), corrupt(service, transport)
        tokens = prompt(f"{kind} {bit}")
        link.flip_next(kind, bit)
        answer, report = ask(service, tokens)
        assert [flipped for flipped, _ in link.flipped] == [kind], "the fault took effect"
        assert answer == driver.generate([tokens], SAMPLING)[0]
        assert retried(service, transport) == before + 1
        assert report.transport == "grpc"
        assert report.kv_reused_tokens == 0, "nothing of the spoiled transfer is in the decode worker's cache"
        counted = (sent + 1, received) if kind in FROM_RECEIVER else (sent, received + 1)
        wait_until(partial(lambda counted: corrupt(service, transport) == counted, counted), 5, "the counts")


def test_a_flip_in_the_answer_to_the_seal(
    service: Service, link: FlippingLink, driver: EngineDriver, transport: str
) -> None:
    """The KV is there and right, only the sender does not know: decode goes on, or the second attempt does it again."""
    before, (sent, received) = retried(service, transport), corrupt(service, transport)
    for number in range(20):
        link.flip_next("done", 100)
        answer, _ = ask(service, prompt(f"done {number}"))
        assert link.flipped == [("done", 100)], "the fault took effect"
        assert answer == driver.generate([prompt(f"done {number}")], SAMPLING)[0]
    assert retried(service, transport) <= before + 20
    wait_until(lambda: corrupt(service, transport) == (sent + 20, received), 5, "the counts")


def test_flips_in_every_attempt_are_one_clean_error(
    service: Service, link: FlippingLink, driver: EngineDriver, transport: str
) -> None:
    before, flips = retried(service, transport), list[str]()
    failed = service.status().failed_requests
    tokens = prompt("always")

    def always(kind: str, size: int) -> int | None:
        if kind not in PAYLOADS:
            return None
        flips.append(kind)
        return size * 8 - 1

    link.flip = always
    with pytest.raises(TransferFailed, match="fails its checksum") as caught:
        ask(service, tokens)
    assert caught.value.code == "transfer_failed"
    assert len(flips) >= 2, "both attempts were spoiled"
    assert set(flips) == ({"data"} if transport == "grpc" else set(PAYLOADS))
    assert retried(service, transport) == before + 1, "one try more, and no third"
    assert service.status().failed_requests == failed + 1
    wait_until(service.idle, 5, "both ends free")
    link.flip = lambda kind, size: None
    answer, _ = ask(service, tokens)
    assert answer == driver.generate([tokens], SAMPLING)[0]


def test_metrics_tell_what_moved_and_what_failed(service: Service, link: FlippingLink, transport: str) -> None:
    ends = ("sent", "received")
    before = {end: kv_counted(service, transport, end) for end in ends}

    def grown(end: str) -> dict[str, float]:
        return {name: value - before[end][name] for name, value in kv_counted(service, transport, end).items()}

    _, report = ask(service, prompt("metrics"))
    assert report.transport == transport
    wait_until(lambda: all(grown(end)["transfers"] for end in ends), 5, "the heartbeats")
    for end in ends:
        moved = grown(end)
        assert moved.pop("seconds") > moved.pop("hidden_seconds") >= 0
        assert moved.pop("transfers") == 1
        assert (moved.pop("bytes"), moved.pop("frames")) == (report.kv_bytes, report.kv_frames)
        assert moved == {"failures": 0, "corrupt_frames": 0}
    link.flip_next("seal", -1)
    ask(service, prompt("metrics again"))
    wait_until(lambda: all(grown(end)["failures"] == 1 for end in ends), 5, "the heartbeats")
    assert [grown(end)["corrupt_frames"] for end in ends] == [0, 1]
