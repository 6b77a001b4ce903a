"""Drives an Engine by hand, without threads or sockets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tandem.config import parse_config
from tandem.engine.engine import Engine
from tandem.engine.sequence import Emission, Failed, NewToken, Sequence
from tandem.types import EngineRequest, SamplingParams, Token


class EngineDriver:
    """Adds requests as a colocated worker does and steps until they end."""

    def __init__(self, model: Path, frame_bytes: int = 1 << 20, **engine: Any) -> None:
        settings = {
            "model": {"path": str(model)},
            "engine": {"kv_memory_mib": 16, **engine},
            "worker": {"frame_bytes": frame_bytes},
        }
        self.engine = Engine(parse_config(settings), self._publish)
        self.tokens: dict[str, list[Token]] = {}
        self.failures: dict[str, Exception] = {}
        self.emissions: list[Emission] = []

    def add(self, name: str, prompt: list[int], sampling: SamplingParams) -> Sequence:
        request = EngineRequest(name, tuple(prompt), sampling)
        self.engine.validate(request)
        table = self.engine.reserve(request, prefill_here=True)
        assert table is not None
        sequence = Sequence(request, lambda event: None, decode_here=True, table=table)
        self.engine.add(sequence)
        return sequence

    def run(self) -> None:
        while self.engine.has_work:
            self.engine.step()

    def generate(self, prompts: list[list[int]], sampling: SamplingParams | list[SamplingParams]) -> list[list[int]]:
        """All prompts in one batch; their output token ids."""
        each = sampling if isinstance(sampling, list) else [sampling] * len(prompts)
        self.tokens.clear()
        for index, (prompt, params) in enumerate(zip(prompts, each, strict=True)):
            self.add(str(index), prompt, params)
        self.run()
        assert self.failures == {}
        return [[token.id for token in self.tokens[str(index)]] for index in range(len(prompts))]

    def _publish(self, emissions: list[Emission]) -> None:
        self.emissions += emissions
        for sequence, event in emissions:
            name = sequence.request.request_id
            if isinstance(event, NewToken):
                self.tokens.setdefault(name, []).append(event.token)
            elif isinstance(event, Failed):
                self.failures[name] = event.error
