"""A process's NIXL by itself: its agents, the devices they may use, and what is said where it cannot be used."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import kv_transfer.carriers.nixl.agent
from kv_transfer.carriers.nixl.agent import Agent, check_devices, reachable
from kv_transfer.carriers.nixl.carrier import NixlCarrier
from kv_transfer.carriers.nixl.messages import Lent
from kv_transfer.carriers.nixl.writer import NixlWriter
from kv_transfer.ends.carrier import PoolMemory
from tandem.config import parse_config
from tandem.errors import ConfigError, TransferFailed

pytestmark = pytest.mark.usefixtures("nixl")


async def test_metadata_of_another_agent_or_none_is_refused() -> None:
    writer, other = NixlWriter("lo"), Agent("lo")
    pool = torch.zeros(1 << 16, dtype=torch.uint8)
    other.register(pool)
    lent = Lent("a" * 32, pool.data_ptr(), "cpu", 0, 1, 1, 1, 0)
    try:
        for metadata, why in ((other.metadata(), "is another agent's"), (b"noise", "does not understand its peer")):
            with pytest.raises(TransferFailed, match=why):
                await writer.connect(object(), pool, lent, metadata)
        await writer.connect(object(), pool, replace(lent, agent_id=other.id), other.metadata())
    finally:
        await writer.aclose()
        other.close()


def test_no_way_to_write_past_the_receiver_is_open_whatever_the_environment_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last way on the list is closed too: nothing is left but tcp."""
    monkeypatch.setenv("UCX_TLS", "all")
    Agent("lo").close()
    monkeypatch.setattr(kv_transfer.carriers.nixl.agent, "_NO_WAYS", (*kv_transfer.carriers.nixl.agent._NO_WAYS, "tcp"))
    with pytest.raises(TransferFailed, match="cannot be started"):
        Agent("lo")


def test_an_agent_listens_where_it_may_and_not_after_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_NET_DEVICES", "all")

    def listening() -> set[str]:
        """This process; the machine's other sockets come and go."""
        rows = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
        own = {os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()}
        return {row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in own}

    before = listening()
    agent = Agent("lo")
    added = listening() - before
    assert added
    assert all(address.startswith("0100007F:") for address in added), "loopback alone"
    agent.close()
    assert not listening() & added


def test_devices_are_checked() -> None:
    check_devices("lo")
    with pytest.raises(ConfigError, match=r"worker\.nixl_devices: this machine has no network device 'nonesuch'"):
        check_devices("lo,nonesuch")


def test_without_nixl_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kv_transfer.carriers.nixl.agent.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"NIXL is not installed; pip install -c constraints\.txt -e '\.\[nixl\]'"):
        check_devices("lo")


def test_a_worker_loads_nixl_when_it_checks_its_devices_and_says_why_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading takes longer than a transfer may: a process that has checked loads nothing more."""
    code = (
        "import sys; from kv_transfer.carriers.nixl.agent import Agent, check_devices; check_devices('lo')\n"
        "before = {*sys.modules}; Agent('lo').close(); print(*{*sys.modules} - before)"
    )
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == ""

    def missing(name: str) -> Any:
        raise ImportError("libucp.so.0: cannot open shared object file")

    with monkeypatch.context() as patch:
        patch.setattr(kv_transfer.carriers.nixl.agent, "import_module", missing)
        with pytest.raises(ConfigError, match=r"worker\.nixl_devices: NIXL cannot be used here: libucp\.so\.0: cannot"):
            check_devices("lo")
    monkeypatch.setattr(kv_transfer.carriers.nixl.agent, "_NO_WAYS", (*kv_transfer.carriers.nixl.agent._NO_WAYS, "tcp"))
    with pytest.raises(ConfigError, match=r"NIXL cannot be used here: NIXL cannot be started"):
        check_devices("lo")


def test_loopback_reaches_nobody_elsewhere() -> None:
    code = "from kv_transfer.carriers.nixl.agent import reachable; print(reachable('lo'))"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == reachable("lo")


def test_between_gpus_it_is_chosen_and_elsewhere_where_it_is_asked_for() -> None:
    worker = parse_config({"worker": {"nixl_devices": "lo"}}).worker
    ranks = {}
    for device in ("cpu", "cuda"):
        carrier = NixlCarrier.make(worker, PoolMemory(device))
        assert carrier is not None
        ranks[device] = carrier.announcement().rank
    assert ranks["cuda"] > ranks["cpu"] == 0
    assert NixlCarrier.make(parse_config({}).worker, PoolMemory("cpu")) is None, "no device is named"
