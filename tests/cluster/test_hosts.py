"""The hosts of the cluster tests: apart from each other while they live, and gone without a trace afterwards."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from hosts import private_network
from service import ROOT, wait_until

# Makes a network, starts a process in it and dies without taking anything down.
DIES = """
import os, signal, sys
sys.path.insert(0, "tests/support")
from hosts import private_network
with private_network("a") as network:
    network.hosts["a"].start_process("sleep", "1000")
    print(network.name, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


LISTS = (["netns", "list"], ["-brief", "link"])


def networks() -> str:
    """What is left of any: namespaces, bridges and links."""
    found = [subprocess.run(["ip", *what], capture_output=True, text=True, check=True).stdout for what in LISTS]
    return "".join(found)


def test_hosts_see_each_other_and_nothing_of_each_other() -> None:
    with private_network("a", "b") as network:
        a, b = network.hosts.values()
        a.run("bash", "-c", "touch ~/mine /tmp/mine /dev/shm/mine")
        assert b.run("bash", "-c", "ls ~ /tmp /dev/shm | grep mine || true") == ""
        assert a.run("hostname") == "a\n"
        sleeper = a.start_process("sleep", "1000")
        wait_until(lambda: any("sleep" in line for line in a.processes().values()), 5, "a process on host a")
        assert not any("sleep" in line for line in b.processes().values())
        assert "sleep" not in b.run("ps", "ax")
        assert b.reaches(a)
        a.cut()
        assert not b.reaches(a)
        a.mend()
        wait_until(lambda: b.reaches(a), 10, "host a to be back")
        folder, name = network.folder, network.name
    with sleeper:
        assert sleeper.wait(5) != 0
    assert name not in networks()
    assert not folder.exists()


def test_a_run_that_died_is_cleaned_up_by_the_next() -> None:
    died = subprocess.run([sys.executable, "-c", DIES], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert died.returncode == -9, died.stderr
    name = died.stdout.strip()
    assert name in networks(), "it left nothing behind, so this test proves nothing"
    # Takes the first free number: the one that the dead run had, unless another run is alive.
    with private_network("a") as network:
        assert network.name == name
        assert not any("sleep" in line for line in network.hosts["a"].processes().values())
    assert name not in networks()
    assert not Path(f"/run/netns/{name}-a").exists()
