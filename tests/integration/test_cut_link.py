"""A link that is cut raises no error by itself: both sides notice within seconds, and meet again when it is back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from links import Link
from service import running_service, wait_until

# Each end's bound (router.heartbeat_timeout_s; keepalive in tandem/rpc.py), and for the way back: the worker's longest
# pause between two tries, one try at a dead link, and a busy machine.
ROUTER_NOTICES_S, WORKER_NOTICES_S, BACK_S = 5.0, 8.0, 12.0


@pytest.fixture
def link() -> Iterator[Link]:
    link = Link()
    yield link
    link.close()


def test_a_cut_worker_is_out_and_comes_back(tmp_path: Path, link: Link) -> None:
    with running_service(tmp_path, prefill=0, decode=0) as service:
        link.target = service.address
        command = ("tandem.cli.main", "worker", "--role", "both", "--router", link.address)
        worker = service.start("worker", *command)
        service.wait_joined(1)

        link.cut()
        since = time.monotonic()
        wait_until(lambda: not service.status().workers, ROUTER_NOTICES_S, "the router noticed")
        assert time.monotonic() - since > 1, "it was lost for another reason than silence"
        wait_until(lambda: "joining again" in worker.output, WORKER_NOTICES_S, "the worker noticed")

        link.mend()
        wait_until(lambda: service.status().workers, BACK_S, "the worker is back")
        assert service.client.complete("The color of dog").text == " can vary widely"
