"""deploy/cluster.onprem.yaml on hosts of this machine: Ray's own launcher, run from a host of its own (the laptop)."""

from __future__ import annotations

import re
import shlex
import sys
import sysconfig
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from hosts import Host, Network, private_network
from service import ROOT, wait_until

LAUNCHER_FILE = ROOT / "deploy" / "cluster.onprem.yaml"
# Starting Ray on three hosts takes two cores a while.
UP_S = 240.0
SCRIPTS = {"ray": "ray.scripts.scripts", "tandem": "tandem.cli.main"}


class OnPremCluster:
    """Hosts `head`, `one` (pool prefill) and `two` (pool decode), and `laptop`; the head has a place in pool decode.

    `router` and `tandem` see each other's processes on no host but their own, as on machines of their own.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self.file = network.folder / "cluster.onprem.yaml"
        self.laptop = network.hosts["laptop"]
        self.nodes = {name: network.hosts[name] for name in ("head", "one", "two")}
        self.head = self.nodes["head"]
        self._is_down = False

    def __enter__(self) -> Self:
        self.file.write_text(self._edited(LAUNCHER_FILE.read_text()))
        for node in self.nodes.values():
            install_environment(node, f"{node.home}/tandem")
        install_environment(self.laptop, str(ROOT))
        self.laptop.run("ray", "get-auth-token", "--generate")
        self.ray("up", "-y", "--no-config-cache", str(self.file))
        wait_until(self._all_joined, UP_S, "three nodes in the cluster")
        return self

    def __exit__(self, *_: object) -> None:
        if not self._is_down:
            self.down()

    def down(self) -> None:
        self.exec("~/tandem/deploy/stop-ray.sh")
        self.ray("down", "-y", str(self.file))
        self._is_down = True

    def ray(self, *arguments: str, timeout_s: float = UP_S, check: bool = True) -> str:
        """Ray's command line on the laptop, in the checkout's folder, as docs/cluster.md says."""
        return self.laptop.run("ray", *arguments, timeout_s=timeout_s, check=check, cwd=ROOT)

    def exec(self, command: str, timeout_s: float = UP_S, check: bool = True) -> str:
        """`ray exec`: a shell command on the head; its own output and Ray's."""
        return self.ray("exec", str(self.file), command, timeout_s=timeout_s, check=check)

    def on_node(self, name: str, command: str) -> str:
        """A shell command on a node, as its user has it after logging in."""
        return self.nodes[name].run("bash", "-c", f"source ~/.bashrc && {command}")

    def python_on_head(self, script: str) -> str:
        """What a script prints that runs beside the router and may `import ray`."""
        return self.on_node("head", "python -W ignore -c " + shlex.quote("import ray\n" + textwrap.dedent(script)))

    def _all_joined(self) -> bool:
        status = self.on_node("head", "ray status")
        return "0.0/1.0 prefill" in status and "0.0/2.0 decode" in status

    def _edited(self, text: str) -> str:
        """What a user does to the lines marked EDIT."""
        changes = {
            "10.0.0.10": self.head.address,
            "10.0.0.11": self.nodes["one"].address,
            "10.0.0.12": self.nodes["two"].address,
            "ssh_user: ubuntu": "ssh_user: root",
            "~/.ssh/id_ed25519": str(self.network.key),
            "pools='{}'": """pools='{"decode": 1}'""",
        }
        lines = text.splitlines()
        for old, new in changes.items():
            marked = [number for number, line in enumerate(lines) if old in line]
            assert marked, f"{LAUNCHER_FILE.name} does not say {old!r}"
            assert all("# EDIT" in lines[number] for number in marked), f"{old!r} stands in a line without EDIT"
            lines = [line.replace(old, new) for line in lines]
        return "\n".join(lines) + "\n"


def install_environment(host: Host, code: str) -> None:
    """A ready `~/tandem/.venv`, so that a node's `make cluster-node` finds all installed: the packages of the Python
    that the tests run with, and before them Tandem from the folder `code`."""
    venv = f"{host.home}/tandem/.venv"
    host.run(sys.executable, "-m", "venv", "--without-pip", venv)
    site = host.run(f"{venv}/bin/python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    _write(host, f"{site}/ready.pth", f"{code}\n{sysconfig.get_path('purelib')}")
    for name, module in SCRIPTS.items():
        _write(host, f"{venv}/bin/{name}", f"#!{venv}/bin/python\nfrom {module} import main\nmain()")
        host.run("chmod", "+x", f"{venv}/bin/{name}")
    host.run("touch", *(f"{venv}/{stamp}.stamp" for stamp in ("torch", "serve", "node")))


def _write(host: Host, path: str, text: str) -> None:
    host.run("bash", "-c", 'printf "%s\\n" "$1" >"$2"', "write", text, path)


@contextmanager
def onprem_cluster() -> Iterator[OnPremCluster]:
    """Ray runs on all three nodes; afterwards nothing does."""
    with private_network("head", "one", "two", "laptop") as network, OnPremCluster(network) as cluster:
        yield cluster


def left_running(host: Host) -> list[str]:
    """Command lines of what is not the host's SSH server."""
    return [line for line in host.processes().values() if not re.match(r"sshd(-session)?: ", line)]
