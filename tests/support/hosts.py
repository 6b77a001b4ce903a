"""Several hosts on one machine, for tests: own address, own processes, own home, own shared memory, own SSH server.

A host is a network namespace on a common bridge plus PID, mount, UTS and IPC namespaces. All that runs in it ends with
its first process, sshd, so a host that is torn down leaves nothing behind, whatever was started there. The disk is
shared, apart from HOME, /dev/shm and /tmp.

Needs root, and the Debian packages iproute2, openssh-server, openssh-client and rsync.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from service import ROOT, wait_until

# What hosts see although it may lie in /tmp: the checkout, and the Python that the tests run with.
KEPT = (ROOT, Path(sys.prefix))
# Networks that may exist at once: test runs side by side.
SLOTS = range(1, 9)
COMMAND_S = 120.0
SSHD = "/usr/sbin/sshd"

# $1 folder of the network, $2 name, $3 address; then folders to keep. HOME moves by /etc/passwd alone, since the Python
# that the tests run with may lie under the real one; /tmp is empty, so what lies there is bound into the new one.
FIRST_PROCESS = """
network=$1 name=$2 address=$3
shift 3
mount --bind "$network/home-$name" "$network/home"
for file in passwd hosts resolv.conf; do mount --bind "$network/$file" "/etc/$file"; done
mount -t tmpfs tmpfs /dev/shm
mkdir -p "$network/tmp-$name"
mount --rbind /tmp "$network/tmp-$name"
mount -t tmpfs tmpfs /tmp
for folder; do
  case "$folder" in /tmp/*) mkdir -p "$folder"; mount --bind "$network/tmp-$name${folder#/tmp}" "$folder" ;; esac
done
umount -l "$network/tmp-$name"
hostname "$name"
cd /
exec SSHD -D -e -f /dev/null -h "$network/hostkey" -o PidFile=none -o UsePAM=no -o PermitRootLogin=yes \
  -o StrictModes=no -o MaxStartups=100 -o MaxSessions=100 -o AuthorizedKeysFile="$network/key.pub" \
  -o ListenAddress="$address" 2>"$network/sshd-$name.log"
""".replace("SSHD", SSHD)


def missing_for_hosts() -> str:
    """What this machine lacks to build hosts; empty if nothing."""
    if os.geteuid() != 0:
        return "root"
    programs = ("ip", "unshare", "nsenter", "setpriv", "rsync", "ssh", "ssh-keygen", SSHD)
    return ", ".join(program for program in programs if shutil.which(program) is None)


class Host:
    """Created by `private_network`, which also ends it."""

    def __init__(self, network: Network, name: str, number: int) -> None:
        self.name = name
        self.address = f"{network.prefix}.{number}"
        self.home = network.home
        self._network = network
        self._namespace = f"{network.name}-{name}"
        self._link = f"{network.name}v{number}"
        self._first: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        folder = self._network.folder
        (folder / f"home-{self.name}").mkdir()
        _run("ip", "netns", "add", self._namespace)
        _run("ip", "link", "add", self._link, "type", "veth", "peer", "name", "eth0", "netns", self._namespace)
        _run("ip", "link", "set", self._link, "master", self._network.name, "up")
        _run("ip", "-n", self._namespace, "address", "add", f"{self.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _run("ip", "-n", self._namespace, "link", "set", device, "up")
        # Nothing answers there; programs find out their own address by asking for a route.
        _run("ip", "-n", self._namespace, "route", "add", "default", "via", f"{self._network.prefix}.1")
        enter = ("ip", "netns", "exec", self._namespace, "setpriv", "--pdeathsig", "KILL", "unshare", "--kill-child")
        spaces = ("--pid", "--fork", "--mount", "--uts", "--ipc", "--mount-proc")
        script = ("bash", "-euc", FIRST_PROCESS, "host", str(folder), self.name, self.address, *map(str, KEPT))
        self._first = subprocess.Popen([*enter, *spaces, *script], stdin=subprocess.DEVNULL)

    def wait_ready(self) -> None:
        assert self._first is not None
        wait_until(lambda: self._first_pid() and self._answers(), 10, f"SSH server of {self.name}")

    def run(
        self,
        *command: str,
        timeout_s: float = COMMAND_S,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> str:
        """Both outputs of the command, run here as root with this host's HOME."""
        done = subprocess.run(
            self._inside(command, cwd),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout_s,
            env=self._environment(env),
        )
        assert not check or done.returncode == 0, f"{self.name}: {command} gave {done.returncode}:\n{done.stdout}"
        return done.stdout

    def start_process(
        self, *command: str, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> subprocess.Popen[bytes]:
        """In a session of its own; ends with the host at the latest."""
        return subprocess.Popen(
            self._inside(command, cwd),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=self._environment(env),
            start_new_session=True,
        )

    def processes(self) -> dict[int, str]:
        """Command lines by pid (this machine's) of all that runs here, the SSH server included."""
        found = {}
        for pid in map(int, _run("ip", "netns", "pids", self._namespace).split()):
            with suppress(OSError):
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                if (
                    line
                    and os.stat(f"/proc/{pid}/ns/pid").st_ino == os.stat(f"/proc/{self._first_pid()}/ns/pid").st_ino
                ):
                    found[pid] = line
        return found

    def reaches(self, other: Host) -> bool:
        """Whether the other's SSH server answers from here."""
        script = f"timeout 1 bash -c 'echo >/dev/tcp/{other.address}/22' 2>/dev/null && echo yes || true"
        return self.run("bash", "-c", script) == "yes\n"

    def cut(self) -> None:
        """Pulls the cable: nothing comes or goes, nobody is told."""
        _run("ip", "link", "set", self._link, "down")

    def mend(self) -> None:
        _run("ip", "link", "set", self._link, "up")

    def _inside(self, command: Sequence[str], cwd: Path | None) -> list[str]:
        enter = ["nsenter", f"--target={self._first_pid()}", "--pid", "--mount", "--net", "--uts", "--ipc"]
        return [*enter, "env", "--chdir", str(cwd or self.home), *command]

    def _environment(self, extra: Mapping[str, str] | None) -> dict[str, str]:
        own = f"{self.home}/tandem/.venv/bin:{Path(sys.executable).parent}"
        path = f"{own}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        return {"HOME": str(self.home), "PATH": path, "LANG": "C.UTF-8", "USER": "root", **(extra or {})}

    def _first_pid(self) -> int:
        """0 before it runs."""
        assert self._first is not None
        assert self._first.poll() is None, f"host {self.name} is gone"
        children = Path(f"/proc/{self._first.pid}/task/{self._first.pid}/children").read_text().split()
        return int(children[0]) if children else 0

    def _answers(self) -> bool:
        try:
            socket.create_connection((self.address, 22), 1).close()
        except OSError:
            return False
        return True

    def wait_ended(self) -> None:
        if self._first is not None:
            self._first.wait(10)


class Network:
    """One bridge, 10.77.SLOT.1 on this machine's side, and a folder for keys and homes."""

    def __init__(self, slot: int) -> None:
        self.name = f"tdm{slot}"
        self.prefix = f"10.77.{slot}"
        self.folder = Path(f"/run/tandem-hosts-{slot}")
        # The same path on every host, each with its own folder mounted there.
        self.home = self.folder / "home"
        self.key = self.folder / "key"
        self.hosts: dict[str, Host] = {}

    def start(self, names: Sequence[str]) -> None:
        self.home.mkdir(parents=True)
        Path("/run/sshd").mkdir(exist_ok=True)
        for name in ("hostkey", "key"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name))
        (self.folder / "passwd").write_text(
            f"root:x:0:0:root:{self.home}:/bin/bash\nsshd:x:105:65534::/run/sshd:/usr/sbin/nologin\n"
        )
        # Names are known or unknown at once: no name server is in reach, and asking it would take half a minute.
        known = "".join(f"{self.prefix}.{10 + index} {name}\n" for index, name in enumerate(names))
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{known}")
        (self.folder / "resolv.conf").touch()
        _run("ip", "link", "add", self.name, "type", "bridge")
        _run("ip", "address", "add", f"{self.prefix}.1/24", "dev", self.name)
        _run("ip", "link", "set", self.name, "up")
        self.hosts = {name: Host(self, name, 10 + index) for index, name in enumerate(names)}
        for host in self.hosts.values():
            host.start()
        for host in self.hosts.values():
            host.wait_ready()

    def stop(self) -> None:
        """Also what a run that died has left under this name."""
        for line in _run("ip", "netns", "list").splitlines():
            if line.startswith(f"{self.name}-"):
                _end_namespace(line.split()[0])
        for host in self.hosts.values():
            host.wait_ended()
        # Links may go with their namespace, but later.
        for device in Path("/sys/class/net").glob(f"{self.name}*"):
            subprocess.run(["ip", "link", "delete", device.name], capture_output=True, timeout=30)
        wait_until(lambda: not list(Path("/sys/class/net").glob(f"{self.name}*")), 10, "the end of all links")
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def private_network(*names: str) -> Iterator[Network]:
    """Hosts of these names, with addresses 10.77.SLOT.10, .11 and so on."""
    with _free_slot() as slot:
        network = Network(slot)
        network.stop()
        try:
            network.start(names)
            yield network
        finally:
            network.stop()


@contextmanager
def _free_slot() -> Iterator[int]:
    """A number that no other living run uses: the lock ends with its process."""
    for slot in SLOTS:
        with open(f"/run/tandem-hosts-{slot}.lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield slot
            return
    raise AssertionError(f"{len(SLOTS)} test networks are in use")


def _end_namespace(name: str) -> None:
    """Ends all that runs in it, then the namespace itself."""
    wait_until(lambda: not _kill_all(name), 10, f"the end of all processes in {name}")
    _run("ip", "netns", "delete", name)


def _kill_all(namespace: str) -> list[int]:
    pids = [int(pid) for pid in _run("ip", "netns", "pids", namespace).split()]
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return pids


def _run(*command: str) -> str:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout
