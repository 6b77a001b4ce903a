"""Readiness: a tiny real request has lately gone through prefill, handoff and decode."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import aclosing

from router.life.request import Orchestrator
from router.life.request_log import RequestLog, new_id
from tandem.errors import TandemError, Unavailable
from tandem.timeline import Phase
from tandem.types import ChoiceFinished, SamplingParams
from tandem.v1 import generation_pb2
from tandem.wire import sampling_to_wire

# What was seen counts for so long, and a probe may take so long.
FRESH_S, PATIENCE_S = 5.0, 5.0


class ReadinessProbe:
    """Asked by many at once, it sends one request at a time."""

    def __init__(self, orchestrator: Orchestrator) -> None:
        self._orchestrator = orchestrator
        self._one = asyncio.Lock()
        self._asked_s = float("-inf")
        self._problem: TandemError | None = None
        # The end of the answer that proved it.
        self._proof: ChoiceFinished | None = None

    async def check(self) -> ChoiceFinished:
        """How the last one went. Raises the TandemError by which it failed; Unavailable from a router that stops."""
        self._orchestrator.check_open()
        async with self._one:
            if time.monotonic() - self._asked_s > FRESH_S:
                await self._ask()
        if self._problem is not None:
            raise self._problem
        assert self._proof is not None
        return self._proof

    async def _ask(self) -> None:
        # Two tokens: the second one is decoded from KV that was handed over.
        sampling = SamplingParams(max_tokens=2, min_tokens=2, ignore_eos=True)
        request = generation_pb2.GenerateRequest(sampling=sampling_to_wire(sampling), user_tag="readiness")
        request.token_ids.ids.append(0)
        try:
            with RequestLog(f"ready-{new_id()}", logging.DEBUG) as entry:
                async with aclosing(self._orchestrator.generate(request, PATIENCE_S, entry, counted=False)) as events:
                    async for event in events:
                        if isinstance(event, ChoiceFinished):
                            assert Phase.DECODE_STARTED in event.report.timeline.marks, "two tokens were asked for"
                            self._proof = event
            self._problem = None
        except TandemError as error:
            words = f"not ready: {error.message}"
            self._problem = (
                Unavailable(words, retry_after_ms=error.retry_after_ms) if type(error) is Unavailable else error
            )
        self._asked_s = time.monotonic()
