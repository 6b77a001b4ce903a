"""The engine on a CUDA device that is not there: right devices, dtypes, shapes and arguments, and few copies.

Numbers do not exist here; tests/gpu/ has those, for whoever has a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_cuda import Device, checked, fake_cuda
from model_zoo import ARCHITECTURES
from transformers import AutoConfig

from tandem.config import parse_config
from tandem.engine import cuda_attention
from tandem.engine import engine as engine_module
from tandem.engine.engine import Engine
from tandem.engine.sequence import Emission, Failed, Sequence
from tandem.types import EngineRequest, SamplingParams

SAMPLINGS = {
    "greedy": SamplingParams(max_tokens=6, ignore_eos=True),
    "temperature": SamplingParams(max_tokens=6, ignore_eos=True, temperature=0.8, seed=3),
    "filtered": SamplingParams(max_tokens=6, ignore_eos=True, temperature=0.8, top_k=5, top_p=0.9, min_p=0.1, seed=3),
    "shaped": SamplingParams(
        max_tokens=6,
        min_tokens=4,
        repetition_penalty=1.2,
        presence_penalty=0.1,
        frequency_penalty=0.1,
        logit_bias={7: 2.0},
    ),
    "logprobs": SamplingParams(max_tokens=6, ignore_eos=True, logprobs=3),
}


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    # Numbers do not exist.
    monkeypatch.setattr(engine_module, "check_exactness", lambda *_: None)
    monkeypatch.setattr("tandem.engine.model_loader._weights_hash", lambda model: "none")
    monkeypatch.setattr("tandem.engine.last_layer._is_rowwise", lambda model, module: "MLP" in type(module).__name__)
    monkeypatch.setattr(cuda_attention, "varlen_attn", checked(cuda_attention.varlen_attn))
    with fake_cuda(monkeypatch) as device:
        yield device


def model_of(architecture: str, folder: Path, **changes: Any) -> Path:
    AutoConfig.for_model(architecture, **{**ARCHITECTURES[architecture], **changes}).save_pretrained(folder)
    return folder


class Run:
    def __init__(self, model: Path, device: Device, dtype: str = "bfloat16", **engine: Any) -> None:
        settings = {
            "model": {"path": str(model), "load_format": "dummy", "dtype": dtype},
            "engine": {"device": "cuda", "kv_memory_mib": 16, "max_step_tokens": 128, **engine},
        }
        self.device = device
        self.emitted: list[Emission] = []
        self.engine = Engine(parse_config(settings), self.emitted.extend)

    def add(self, prompt: list[int], sampling: SamplingParams) -> None:
        request = EngineRequest(str(len(prompt)), tuple(prompt), sampling)
        table = self.engine.reserve(request, prefill_here=True)
        self.engine.add(Sequence(request, lambda event: None, decode_here=True, table=table))

    def step(self) -> tuple[int, int]:
        """Copies to the device, and from it."""
        self.device.forget()
        self.engine.step()
        assert [event for _, event in self.emitted if isinstance(event, Failed)] == []
        return len(self.device.copied_in), len(self.device.copied_out)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_decode_step_copies_twice_in_and_once_out(sampling: str, tmp_path: Path, device: Device) -> None:
    run = Run(model_of("llama", tmp_path), device)
    for prompt in ([5, 6, 7], list(range(3, 60)), [9] * 200):
        run.add(prompt, SAMPLINGS[sampling])
    while run.engine.load.queued_prompt_tokens:
        run.step()
    steps = []
    while run.engine.has_work:
        steps.append(run.step())
    print(steps, device.copied_in, device.copied_out)
    assert len(steps) >= 3
    assert max(into for into, _ in steps) <= 2
    assert {out for _, out in steps} == {1}
