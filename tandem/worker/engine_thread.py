"""Runs the engine in a thread of its own, so that the event loop never waits for torch (law 6)."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

from tandem.config import TandemConfig
from tandem.engine.backends.backend import Allocate
from tandem.engine.engine import Engine
from tandem.engine.sequence import Emission
from tandem.process import logs

log = logging.getLogger(__name__)
T = TypeVar("T")


class EngineThread:
    """Steps while there is work; runs posted calls between steps; hands what steps bring to the event loop.

    One loop callback per step delivers all of its events, each to its sequence's listener, in order.

        building ──▶ idle ◀──▶ stepping ◀──▶ stuck (everybody waits for blocks: until a call or `wake`)
                       └──────────┴── stop() ──▶ ended;  a bug outside of a step's own failures ──▶ `crashed`
    """

    def __init__(self, config: TandemConfig, allocate: Allocate | None = None) -> None:
        """Returns once the model is loaded; allocate: see KVCache. Raises ModelRefused, or what else loading raises.

        The model is loaded by the thread that will step it. OpenMP keeps a pool of threads for every thread that starts
        a parallel region, and where all pools together have more threads than cores, none of them waits busily any
        more: a second pool, even an idle one, makes decoding 1.4 times slower.
        """
        self.engine: Engine
        self._calls: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        # Gets an exception when the thread dies of a bug: nothing steps any more, so the process must end.
        self.crashed: asyncio.Future[None] | None = None
        built: Future[None] = Future()
        build = partial(Engine, config, partial(self._call_in_loop, self._deliver), allocate)
        self._thread = threading.Thread(target=self._run, args=(build, built), name="engine", daemon=True)
        self._thread.start()
        built.result()

    def start(self) -> None:
        """What steps bring is delivered in the running event loop; no call or sequence may come before this."""
        self._loop = asyncio.get_running_loop()
        self.crashed = self._loop.create_future()

    def stop(self) -> None:
        """Ends after the step under way. Blocks for it."""
        self.post(self._stopping.set)
        self._thread.join()

    def post(self, call: Callable[[], object]) -> None:
        """Runs `call` between steps; nobody waits for it."""
        self._calls.put(call)

    def wake(self) -> None:
        """Blocks came back: whoever waited for them may go on."""
        self.post(lambda: None)

    async def call(self, function: Callable[[], T]) -> T:
        """Runs `function` between steps and returns its result, or raises what it raised."""
        assert self._loop is not None
        done: asyncio.Future[T] = self._loop.create_future()

        def run() -> None:
            try:
                result = function()
            except Exception as error:
                self._call_in_loop(_settle, done, error, None)
            else:
                self._call_in_loop(_settle, done, None, result)

        self._calls.put(run)
        return await done

    def _run(self, build: Callable[[], Engine], built: Future[None]) -> None:
        try:
            self.engine = build()
        except BaseException as error:  # whoever waits for it gets it
            built.set_exception(error)
            return
        built.set_result(None)
        try:
            stuck = False
            while not self._stopping.is_set():
                self._drain_calls(block=stuck or not self.engine.has_work)
                stuck = self.engine.has_work and not self.engine.step()
        except Exception as error:
            log.exception("the engine's thread crashed")
            self._call_in_loop(_settle, self.crashed, error, None)

    def _drain_calls(self, block: bool) -> None:
        try:
            while True:
                self._calls.get(block=block)()
                block = False
        except queue.Empty:
            return

    def _deliver(self, emissions: list[Emission]) -> None:
        for sequence, event in emissions:
            try:
                sequence.listener(event)
            except Exception:
                # A bug, of this request alone: the others of the step get their events.
                logs.of_request(__name__, sequence.request.request_id).exception("its listener failed")
                self.post(partial(self.engine.abort, sequence))

    def _call_in_loop(self, callback: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:
            # The loop closed while a step was under way: the process is leaving and nobody listens.
            log.debug("event loop closed; dropped an engine event")


def _settle(done: asyncio.Future[T], error: Exception | None, result: T) -> None:
    if done.cancelled():
        return
    if error is not None:
        done.set_exception(error)
    else:
        done.set_result(result)
