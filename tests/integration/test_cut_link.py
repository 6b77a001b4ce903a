"""A link that is cut raises no error by itself: both sides notice within seconds, and meet again when it is back."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from service import running_service, wait_until

# Each end's bound (router.heartbeat_timeout_s; keepalive in tandem/rpc.py), and for the way back: the worker's longest
# pause between two tries, one try at a dead link, and a busy machine.
ROUTER_NOTICES_S, WORKER_NOTICES_S, BACK_S = 5.0, 8.0, 12.0


class Link:
    """A TCP relay to one address, in a thread of its own, that can fall silent without closing anything."""

    def __init__(self) -> None:
        self.target = ""
        self._loop = asyncio.new_event_loop()
        self._whole = asyncio.Event()
        self._whole.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        server = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._relay, "127.0.0.1", 0), self._loop).result(
            5
        )
        self.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._server = server

    def cut(self) -> None:
        self._loop.call_soon_threadsafe(self._whole.clear)

    def mend(self) -> None:
        self._loop.call_soon_threadsafe(self._whole.set)

    def close(self) -> None:
        async def end() -> None:
            self._server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    async def _relay(self, near: asyncio.StreamReader, near_out: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._whole.wait()
            host, _, port = self.target.rpartition(":")
            far, far_out = await asyncio.open_connection(host, int(port))
            try:
                await asyncio.gather(self._pump(near, far_out), self._pump(far, near_out))
            finally:
                far_out.close()
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            near_out.close()
            self._tasks.discard(task)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(1 << 16):
            await self._whole.wait()
            sink.write(data)
            await sink.drain()
        raise ConnectionResetError


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
