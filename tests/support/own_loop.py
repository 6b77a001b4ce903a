"""A server on a loop and in a thread of its own, so that blocking clients can be tested against it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

# Called on that loop: sets the first event once it serves, and ends when the second one is set.
Serve = Callable[[threading.Event, asyncio.Event], Coroutine[Any, Any, None]]


@contextmanager
def serving_by(serve: Serve) -> Iterator[None]:
    started, loop, stop = threading.Event(), asyncio.new_event_loop(), asyncio.Event()

    def run() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(serve(started, stop))

    thread = threading.Thread(target=run, name=serve.__qualname__)
    thread.start()
    try:
        assert started.wait(10), f"{thread.name} did not start"
        yield
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        assert not thread.is_alive()
