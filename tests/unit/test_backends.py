"""A backend as docs/extend.md has a newcomer begin one: torch alone, and no line of Tandem edited."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_driver import EngineDriver
from model_zoo import save_model
from torch import Tensor, nn

from tandem.engine.backends import torch_attention
from tandem.engine.backends.backend import BACKENDS, Attention, Backend, backend_for
from tandem.engine.backends.cpu.backend import CpuBackend
from tandem.engine.batch import AttentionOptions, PagedBatch
from tandem.types import SamplingParams

PROMPTS = [[5, 6, 7], list(range(3, 60)), [9] * 20]
PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)


class TorchBackend(CpuBackend):
    """The host's memory, and nothing computed by a kernel of Tandem's."""

    def __init__(self) -> None:
        # What plans were asked for, and how often attention was computed.
        self.planned: list[AttentionOptions] = []
        self.computed = 0

    write_kv = staticmethod(torch_attention.write_kv)

    def prepare_model(self, model: nn.Module) -> None:
        pass

    def plan_attention(self, batch: PagedBatch, options: AttentionOptions) -> Attention:
        self.planned.append(options)
        plan = torch_attention.TorchAttention(batch, options)

        def attention(*tensors: Tensor) -> Tensor:
            self.computed += 1
            return plan(*tensors)

        return attention


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[TorchBackend]:
    monkeypatch.setitem(BACKENDS, "cpu", f"{__name__}:TorchBackend")
    backend_for.cache_clear()
    made: Any = backend_for("cpu")
    yield made
    backend_for.cache_clear()


def decode_step(driver: EngineDriver) -> None:
    for index, prompt in enumerate(PROMPTS):
        driver.add(str(index), prompt, PARAMS)
    while driver.engine.load.queued_prompt_tokens:
        driver.engine.step()
    driver.engine.backend.planned.clear()  # type: ignore[attr-defined]
    driver.engine.step()


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_another_backend_gives_the_same_tokens(
    architecture: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = save_model(architecture, tmp_path)
    wanted = EngineDriver(model, max_step_tokens=24).generate(PROMPTS, PARAMS)
    plain = request.getfixturevalue("plain")
    driver = EngineDriver(model, max_step_tokens=24)
    assert driver.engine.backend is plain
    assert driver.generate(PROMPTS, PARAMS) == wanted
    assert plain.computed > 0


def test_a_plan_is_made_once_a_step_for_all_layers_that_ask_for_the_same(tmp_path: Path, plain: TorchBackend) -> None:
    """Three layers, two of them with a window; every row of a decode step is read, so none is planned apart."""
    driver = EngineDriver(save_model("gemma3_text", tmp_path))
    decode_step(driver)
    assert sorted(options.window for options in plain.planned) == [0, 24]


def test_both_backends_are_backends() -> None:
    backends: list[Backend] = [backend_for(device) for device in ("cpu", "cuda")]
    assert [backend.name for backend in backends] == list(BACKENDS) == ["cpu", "cuda"]
    assert [backend.dtype for backend in backends] == [torch.float32, "auto"]
    assert [backend.block_size for backend in backends] == [16, 256]
