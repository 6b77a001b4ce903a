"""One-sided writes by NIXL over UCX: the only module of this package that knows NIXL.

An agent registers pools, and writes into those of others whose metadata it was given. Metadata is NIXL's own encoding:
opaque bytes to everybody else, never unpickled by anybody. No agent has a thread of its own here: UCX moves bytes when
an agent is asked for its state, at the receiving end too. So whoever has one drives it (driver.py),
and nothing is written through an agent that is closed.

Everything here blocks, or takes as long as copying, and belongs in a driver's thread.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tandem.errors import ConfigError, TransferFailed

log = logging.getLogger(__name__)

# (address, bytes, index of the device) of pieces of memory, as NIXL takes them: uint64 [pieces, 3].
Pieces = NDArray[np.uint64]
# What NIXL calls the memory of a device.
KINDS = {"cpu": "DRAM", "cuda": "VRAM"}
# UCX has ways for a writer to reach the receiver's memory by itself: through the kernel of a host that both share, or
# from GPU to GPU. Those end with the writer. All others end with the receiver's agent, which is what fences rely on.
_NO_WAYS = ("cma", "knem", "xpmem", "cuda_ipc")
_IFF_LOOPBACK = 0x8
_DEVICE_FOLDERS = (Path("/sys/class/net"), Path("/sys/class/infiniband"))


def check_devices(devices: str) -> None:
    """Checks worker.nixl_devices before threads begin: holds UCX to them, and has all loaded that NIXL needs.

    Loading takes longer than any transfer may. Raises ConfigError when there is no such device, or NIXL cannot be used.
    """
    if _package() is None:
        raise ConfigError(
            "config key worker.nixl_devices: NIXL is not installed; "
            "pip install -c constraints.txt -e '.[nixl]' in a checkout brings it",
            field="worker.nixl_devices",
        )
    for device in devices.split(","):
        name = device.partition(":")[0]
        if not any((folder / name).exists() for folder in _DEVICE_FOLDERS):
            raise ConfigError(
                f"config key worker.nixl_devices: this machine has no network device {device!r}",
                field="worker.nixl_devices",
            )
    _confine(devices)
    try:
        _load()
        Agent(devices).close()
    except (ImportError, OSError, TransferFailed) as error:
        raise ConfigError(
            f"config key worker.nixl_devices: NIXL cannot be used here: {error}", field="worker.nixl_devices"
        ) from None


def reachable(devices: str) -> str:
    """Equal in two workers that reach each other: with the same kind of NIXL, and over loopback in one network
    namespace alone."""
    package = _package()
    assert package is not None, "check_devices found it"
    reach: list[str | int] = [version(package.replace("_", "-"))]
    flags = [_DEVICE_FOLDERS[0] / device / "flags" for device in devices.split(",")]
    if all(each.exists() and int(each.read_text(), 16) & _IFF_LOOPBACK for each in flags):
        reach += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.stat("/proc/self/ns/net").st_ino]
    return hashlib.sha256(repr(reach).encode()).hexdigest()[:32]


def _package() -> str | None:
    """NIXL's, built for torch's version of CUDA if there is one."""
    builds = [f"nixl_cu{(torch.version.cuda or '12').partition('.')[0]}", "nixl_cu12", "nixl_cu13"]
    return next((build for build in builds if find_spec(build) is not None), None)


def _load() -> Any:
    package = _package()
    assert package is not None, "check_devices found it"
    raising = logging.raiseExceptions
    api = import_module(f"{package}._api")
    # It changes the logging of the whole process, and would write to stdout.
    logging.raiseExceptions = raising
    theirs = logging.getLogger("nixl")
    theirs.handlers.clear()
    theirs.propagate = True
    theirs.setLevel(logging.WARNING)
    return api


class Agent:
    """One end of NIXL, with a name of 128 random bits."""

    def __init__(self, devices: str) -> None:
        """devices: see worker.nixl_devices. Raises TransferFailed."""
        api = _load()
        _confine(devices)
        self.id = secrets.token_hex(16)
        # What NIXL raises are many classes without a common one of its own.
        try:
            self._agent = api.nixl_agent(self.id, api.nixl_agent_config(enable_prog_thread=False, backends=[]))
            self._agent.create_backend("UCX")
        except Exception as error:
            raise _failed("cannot be started", error) from None
        # By address.
        self._registered: dict[int, Any] = {}

    def register(self, pool: Tensor) -> None:
        """Registers a pool, once for as long as the agent lives."""
        if pool.data_ptr() in self._registered:
            return
        place = (pool.data_ptr(), pool.nbytes, max(0, pool.get_device()), "")
        try:
            self._registered[pool.data_ptr()] = self._agent.register_memory([place], KINDS[pool.device.type])
        except Exception as error:
            raise _failed("takes no memory of this pool", error) from None

    def metadata(self) -> bytes:
        """How others reach this agent and what it has registered."""
        metadata: bytes = self._agent.get_agent_metadata()
        return metadata

    def connect(self, peer: str, metadata: bytes) -> None:
        """Raises TransferFailed unless this is the metadata of that agent."""
        try:
            name = self._agent.add_remote_agent(metadata)
        except Exception as error:
            raise _failed("does not understand its peer", error) from None
        if name not in (peer, peer.encode()):
            self._agent.remove_remote_agent(name)
            raise TransferFailed("the peer's NIXL metadata is another agent's")

    def disconnect(self, peer: str) -> None:
        """Ends the connection to it: writes under way fail."""
        try:
            self._agent.remove_remote_agent(peer)
        except Exception as error:
            log.warning("NIXL did not let go of a peer: %s", error)

    def write(self, peer: str, near: Pieces, near_kind: str, far: Pieces, far_kind: str) -> Write:
        """Begins to write each near piece to the far one beside it. Raises TransferFailed."""
        agent = self._agent
        try:
            descriptions = (agent.get_xfer_descs(near, near_kind), agent.get_xfer_descs(far, far_kind))
            handle = agent.initialize_xfer("WRITE", *descriptions, peer)
        except Exception as error:
            raise _failed("cannot write there", error) from None
        write = Write(agent, handle)
        write.start()
        return write

    def progress(self) -> None:
        """Moves what waits to be moved. Raises TransferFailed."""
        try:
            self._agent.get_new_notifs()
        except Exception as error:
            raise _failed("does not go on", error) from None

    def close(self) -> None:
        """Nobody writes into the registered pools by this agent any more."""
        for registered in self._registered.values():
            try:
                self._agent.deregister_memory(registered)
            except Exception as error:
                log.warning("NIXL keeps a pool of an agent that ends: %s", error)
        self._registered.clear()
        # Its destructor closes its sockets and queue pairs.
        del self._agent


class Write:
    """One write under way."""

    def __init__(self, agent: Any, handle: Any) -> None:
        self._agent = agent
        self._handle = handle
        self._state = "PROC"

    def start(self) -> None:
        """Raises TransferFailed."""
        self._update(self._agent.transfer)

    def ended(self) -> bool:
        """Whether all of it is in the peer's memory. Raises TransferFailed when it never will be."""
        if self._state == "PROC":
            self._update(self._agent.check_xfer_state)
        return self._state == "DONE"

    def _update(self, ask: Any) -> None:
        try:
            self._state = ask(self._handle)
        except Exception as error:
            self._state = "ERR"
            self._release()
            raise _failed("lost its peer", error) from None
        if self._state == "PROC":
            return
        self._release()
        if self._state != "DONE":
            raise TransferFailed("NIXL reports a write that failed")

    def _release(self) -> None:
        try:
            self._handle.release()
        except Exception as error:
            log.warning("NIXL keeps a write that has ended: %s", error)


def _confine(devices: str) -> None:
    """By UCX's environment, whatever it was: NIXL cuts a list at its first comma, and gives way to the environment."""
    for name, wanted in (("UCX_NET_DEVICES", devices), ("UCX_TLS", f"^{','.join(_NO_WAYS)}")):
        if os.environ.get(name) != wanted:
            os.environ[name] = wanted


def _failed(what: str, error: Exception) -> TransferFailed:
    log.info("NIXL %s: %s", what, error)
    return TransferFailed(f"NIXL {what}: {type(error).__name__}")


def pieces_of(
    pool_address: int,
    shape: Sequence[int],
    row_bytes: int,
    spans: Sequence[tuple[int, int]],
    layers: range,
    device: int,
) -> Pieces:
    """Where a payload's cells lie in a pool of `shape` [L, 2, N, P, ...]; spans: see cells.slot_spans."""
    slots = shape[2] * shape[3]
    planes = np.arange(2 * layers.start, 2 * layers.stop, dtype=np.uint64) * np.uint64(slots * row_bytes)
    starts = np.array([slot for slot, _ in spans], dtype=np.uint64) * np.uint64(row_bytes)
    sizes = np.array([count for _, count in spans], dtype=np.uint64) * np.uint64(row_bytes)
    pieces = np.empty((len(planes) * len(spans), 3), dtype=np.uint64)
    pieces[:, 0] = (np.add.outer(planes, starts) + np.uint64(pool_address)).ravel()
    pieces[:, 1] = np.tile(sizes, len(planes))
    pieces[:, 2] = device
    return pieces
