"""A flipped bit between real workers: one try more, or one clean error; and what metrics count."""

from __future__ import annotations

import random
from collections.abc import Iterator

import httpx
import psutil
import pytest
from engine_driver import EngineDriver
from links import FlippingLink
from service import Service, running_service, wait_until

from tandem.config import TINY_MODEL
from tandem.errors import TransferFailed
from tandem.types import RequestReport, SamplingParams

SAMPLING = SamplingParams(max_tokens=12, ignore_eos=True)
RETRIED = 'tandem_retried_attempts_total{reason="transfer_failed",transport="grpc"}'
# Several data frames of 4 KiB, and a last block that is not full.
PROMPT_TOKENS = 75


@pytest.fixture(scope="module")
def link() -> Iterator[FlippingLink]:
    link = FlippingLink()
    yield link
    link.close()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, link: FlippingLink) -> Iterator[Service]:
    """Whoever speaks to the decode worker does so over the link."""
    with running_service(
        tmp_path_factory.mktemp("flips"),
        decode=0,
        wait=False,
        worker={"frame_bytes": 4096},
        # Not what these workers share on one host: only frames with their payload can be flipped on a link.
        router={"heartbeat_interval_s": 0.05, "transport": "grpc"},
    ) as service:
        link.cut()
        worker = service.start_worker("decode-0", "decode", worker={"advertise": link.address})
        link.target = wait_until(lambda: listens_at(worker.pid), 60, "the decode worker's port")
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


def kv_counted(service: Service, direction: str) -> dict[str, float]:
    """Of transport grpc: bytes, frames and so on, by name."""
    end, found = f'direction="{direction}",transport="grpc"', {}
    for name, value in metrics(service).items():
        if name.startswith("tandem_worker_kv_") and end in name:
            found[name.partition("{")[0].removeprefix("tandem_worker_kv_").removesuffix("_total")] = value
    return found


@pytest.mark.parametrize("kind", ["open", "data", "seal"])
@pytest.mark.parametrize("bit", [3, 77, 500, -1], ids=["magic", "checksum", "header", "end"])
def test_one_flip_is_retried_once_with_the_same_tokens(
    service: Service, link: FlippingLink, driver: EngineDriver, kind: str, bit: int
) -> None:
    before, corrupt = metrics(service).get(RETRIED, 0), kv_counted(service, "received")["corrupt_frames"]
    tokens = prompt(f"{kind} {bit}")
    link.flip_next(kind, bit)
    answer, report = ask(service, tokens)
    assert [flipped for flipped, _ in link.flipped] == [kind], "the fault took effect"
    assert answer == driver.generate([tokens], SAMPLING)[0]
    assert metrics(service)[RETRIED] == before + 1
    assert report.kv_reused_tokens == 0, "nothing of the spoiled transfer is in the decode worker's cache"
    wait_until(lambda: kv_counted(service, "received")["corrupt_frames"] == corrupt + 1, 5, "the count")


def test_a_flip_in_the_answer_to_the_seal(service: Service, link: FlippingLink, driver: EngineDriver) -> None:
    """The KV is there and right, only the sender does not know: decode goes on, or the second attempt does it again."""
    before, corrupt = metrics(service).get(RETRIED, 0), kv_counted(service, "sent")["corrupt_frames"]
    for number in range(20):
        link.flip_next("done", 100)
        answer, _ = ask(service, prompt(f"done {number}"))
        assert link.flipped == [("done", 100)], "the fault took effect"
        assert answer == driver.generate([prompt(f"done {number}")], SAMPLING)[0]
    assert metrics(service).get(RETRIED, 0) <= before + 20
    wait_until(lambda: kv_counted(service, "sent")["corrupt_frames"] == corrupt + 20, 5, "the count")


def test_flips_in_every_attempt_are_one_clean_error(service: Service, link: FlippingLink, driver: EngineDriver) -> None:
    before, flips = metrics(service).get(RETRIED, 0), []
    failed = service.status().failed_requests
    tokens = prompt("always")

    def always(kind: str, size: int) -> int | None:
        if kind == "data":
            flips.append(size)
        return size * 8 - 1 if kind == "data" else None

    link.flip = always
    with pytest.raises(TransferFailed, match="fails its checksum") as caught:
        ask(service, tokens)
    assert caught.value.code == "transfer_failed"
    assert len(flips) >= 2, "both attempts were spoiled"
    assert metrics(service)[RETRIED] == before + 1, "one try more, and no third"
    assert service.status().failed_requests == failed + 1
    wait_until(service.idle, 5, "both ends free")
    link.flip = lambda kind, size: None
    answer, _ = ask(service, tokens)
    assert answer == driver.generate([tokens], SAMPLING)[0]


def test_metrics_tell_what_moved_and_what_failed(service: Service, link: FlippingLink) -> None:
    ends = ("sent", "received")
    before = {end: kv_counted(service, end) for end in ends}
    _, report = ask(service, prompt("metrics"))
    wait_until(lambda: all(grown(service, before, end)["transfers"] for end in ends), 5, "the heartbeats")
    for end in ends:
        moved = grown(service, before, end)
        assert moved.pop("seconds") > moved.pop("hidden_seconds") >= 0
        assert moved.pop("transfers") == 1
        assert (moved.pop("bytes"), moved.pop("frames")) == (report.kv_bytes, report.kv_frames)
        assert moved == {"failures": 0, "corrupt_frames": 0}
    link.flip_next("seal", -1)
    ask(service, prompt("metrics again"))
    wait_until(lambda: all(grown(service, before, end)["transfers"] == 2 for end in ends), 5, "the heartbeats")
    for end in ends:
        moved = grown(service, before, end)
        assert (moved["failures"], moved["corrupt_frames"]) == (1, end == "received")


def grown(service: Service, before: dict[str, dict[str, float]], end: str) -> dict[str, float]:
    return {name: value - before[end][name] for name, value in kv_counted(service, end).items()}
