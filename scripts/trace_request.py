"""How many files one request crosses: `python scripts/trace_request.py [ROOT]`, with PYTHONPATH=ROOT for another tree.

Counted are files of the rooms in which a Python function runs while one prompt goes from the client through the router,
a prefill and a decode worker on CPU, and back. Heartbeats of those moments are among them; what numba compiled runs
unseen, and so do files of values alone. Another request has come before, so nothing connects or compiles any more.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import tempfile
import threading
from pathlib import Path
from types import FrameType

TOP = ("tandem", "router", "prefill_worker", "decode_worker", "kv_transfer", "loadtest")
# A first start compiles the CPU kernels.
START_S = 600.0
# Folder that every process writes what it saw into, a file named by its pid.
FOLDER = "TRACE_REQUEST_FOLDER"
seen: set[str] = set()


def note(frame: FrameType, event: str, _: object) -> None:
    if event == "call":
        seen.add(frame.f_code.co_filename)


def record() -> None:
    """Called by every process of the service before all else: SIGUSR1 begins the count, SIGUSR2 writes it."""

    def begin(*_: object) -> None:
        seen.clear()
        sys.setprofile(note)  # of the main thread, which loads the model before and would take thrice as long for it

    def write(*_: object) -> None:
        Path(os.environ[FOLDER], str(os.getpid())).write_text("\n".join(tuple(seen)))

    signal.signal(signal.SIGUSR1, begin)
    signal.signal(signal.SIGUSR2, write)
    threading.setprofile(note)


async def files_of_one_request(root: Path, folder: Path) -> set[Path]:
    from tandem.client import AsyncClient
    from tandem.config import load_config
    from tandem.launch.processes import Supervisor

    (folder / "sitecustomize.py").write_text("import trace_request\ntrace_request.record()\n")
    os.environ[FOLDER] = str(folder)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), str(Path(__file__).parent), str(root)])
    config = load_config(None, {"router": {"port": 0, "http_port": -1}, "engine": {"kv_memory_mib": 64}})
    async with (
        Supervisor(config, output=None, start_timeout_s=START_S) as supervisor,
        AsyncClient(supervisor.address) as client,
    ):
        await client.complete("Once upon", max_tokens=16)
        pids = list(supervisor.pids().values())
        for pid in pids:
            os.kill(pid, signal.SIGUSR1)
        sys.setprofile(note)
        await client.complete("The color of dog", max_tokens=16)
        sys.setprofile(None)
        for pid in pids:
            os.kill(pid, signal.SIGUSR2)
    names = seen.union(*((folder / str(pid)).read_text().splitlines() for pid in pids))
    ours = {Path(name).relative_to(root) for name in names if Path(name).is_relative_to(root)}
    return {path for path in ours if path.parts[0] in TOP and path.parts[:2] != ("tandem", "v1")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, nargs="?", default=Path(__file__).parents[1])
    root = parser.parse_args().root.resolve()
    with tempfile.TemporaryDirectory() as folder:
        files = asyncio.run(asyncio.wait_for(files_of_one_request(root, Path(folder)), timeout=2 * START_S))
    print(f"{len(files)} files:", *sorted(map(str, files)), sep="\n    ")


if __name__ == "__main__":
    main()
