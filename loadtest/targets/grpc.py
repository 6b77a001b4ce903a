"""Tandem over gRPC, through the SDK."""

from __future__ import annotations

import time

from loadtest.metrics import Outcome
from loadtest.schedule.workloads import LoadRequest
from loadtest.targets.target import SendOptions, Served
from tandem.client import AsyncClient
from tandem.errors import ModelNotFound, TandemError, Unavailable
from tandem.types import ChoiceFinished, Completed, Delta, SamplingParams


class GrpcTarget:
    backend = "tandem-grpc"

    def __init__(self, address: str, options: SendOptions) -> None:
        """Raises InvalidRequest for an address that is none."""
        self._client = AsyncClient(address, timeout_s=options.timeout_s)
        self._options = options

    async def describe(self) -> Served:
        models = await self._client.models()
        wanted = self._options.model
        found = next((model for model in models if wanted in ("", model.name)), None)
        if found is None and not models:
            raise Unavailable("no worker is joined to the router")
        if found is None:
            raise ModelNotFound(f"no worker serves a model {wanted}")
        return Served(found.name, found.vocab_size, found.max_model_len)

    async def send_request(self, request: LoadRequest, outcome: Outcome) -> None:
        outcome.sent_s = time.perf_counter()
        try:
            await self._stream(request, outcome)
        except TandemError as error:
            outcome.set_failure(error.code, error.message)

    async def _stream(self, request: LoadRequest, outcome: Outcome) -> None:
        sampling = SamplingParams(
            max_tokens=request.output_tokens,
            temperature=self._options.temperature,
            ignore_eos=self._options.ignore_eos,
        )
        async for event in self._client.generate(
            request.prompt_ids.tolist(),
            sampling=sampling,
            model=self._options.model,
            cache_salt=self._options.cache_salt,
        ):
            match event:
                case Delta() if event.tokens:
                    outcome.arrivals_s.append(time.perf_counter())
                case ChoiceFinished(report=report):
                    outcome.phases_ms = {phase.value: at_ms for phase, at_ms in report.timeline.marks.items()}
                    outcome.workers = (report.prefill_worker, report.decode_worker)
                case Completed(usage=usage):
                    outcome.prompt_tokens, outcome.counted_tokens = usage.prompt_tokens, usage.output_tokens

    async def close(self) -> None:
        await self._client.close()
