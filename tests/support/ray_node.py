"""A private Ray cluster of one node, in processes that end with `running`; and this process as a part of it.

As a script: the head, which says its address on stdout and lives until its stdin ends.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STORE_BYTES = 256 << 20
# Ray reads these once, when it is imported: all clusters of one run of the tests share them.
ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32),
}


@contextmanager
def running(store_bytes: int = STORE_BYTES) -> Iterator[str]:
    """The address of the cluster."""
    folder = tempfile.mkdtemp(prefix="r-", dir="/tmp")  # short: it holds Unix sockets
    head = subprocess.Popen(
        [sys.executable, __file__, folder, str(store_bytes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **ENVIRONMENT},
        cwd=Path(__file__).parents[2],
    )
    with head:
        assert head.stdin is not None
        assert head.stdout is not None
        try:
            address = head.stdout.readline().strip()
            assert address, "Ray did not start"
            yield address
        finally:
            head.stdin.close()
            head.wait(60)
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def joined(address: str) -> Iterator[None]:
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    os.environ.update(ENVIRONMENT)
    _init(address=address)
    for signum, handler in handlers.items():
        signal.signal(signum, handler)  # Ray has put its own there
    try:
        yield
    finally:
        _leave()


def _init(**arguments: object) -> str:
    import ray

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        context = ray.init(log_to_driver=False, logging_level="ERROR", **arguments)
    return str(context.address_info["gcs_address"])


def _leave() -> None:
    import ray

    ray.shutdown()


def _head(folder: str, store_bytes: int) -> None:
    # Nothing runs in it: no processes wait for tasks.
    address = _init(
        _temp_dir=folder,
        object_store_memory=store_bytes,
        include_dashboard=False,
        num_cpus=0,
        # A store that is full stays so: Ray moves no object to disk to make room.
        _system_config={"automatic_object_spilling_enabled": False},
    )
    print(address, flush=True)
    sys.stdin.read()
    _leave()


if __name__ == "__main__":
    _head(sys.argv[1], int(sys.argv[2]))
