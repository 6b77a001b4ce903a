"""The last layer's cut: rows that are read stay as they were, others cost nothing, mixing rows is noticed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tandem.engine.last_layer import LastLayer
from tests.support.model_zoo import save_model

ROWS = torch.tensor([2, 9])


class CountRows(nn.Module):
    """A module with parts that notes how many rows it was given."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.rows = inner, 0

    def forward(self, x: Tensor) -> Tensor:
        self.rows = x.shape[1]
        out: Tensor = self.inner(x)
        return out


class Shifted(CountRows):
    """Every row also depends on the one before it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + x.roll(1, dims=1))


def build(architecture: str, folder: Path, wrap: type[CountRows]) -> tuple[Any, CountRows, nn.Module]:
    """A tiny model, the module in place of its last layer's MLP, and its last layer's attention."""
    model: Any = AutoModelForCausalLM.from_pretrained(save_model(architecture, folder)).eval()
    layer = model.transformer.h[-1] if architecture == "gpt2" else model.base_model.layers[-1]
    layer.mlp = wrap(layer.mlp)
    attention = next(child for name, child in layer.named_children() if "attn" in name or name == "attention")
    return model, layer.mlp, attention


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "mixtral"])
def test_needed_rows_stay_and_the_others_are_not_computed(architecture: str, tmp_path: Path) -> None:
    model, mlp, attention = build(architecture, tmp_path, CountRows)
    ids = torch.randint(0, 100, (1, 12), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        want = model(ids).logits[0, ROWS]
        last = LastLayer(model, attention)
        with last.only(ROWS):
            got = model(ids, logits_to_keep=ROWS).logits[0]
        assert mlp.rows == len(ROWS)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(ids).logits[0, ROWS], want)
    assert mlp.rows == 12


def test_a_module_that_mixes_rows_is_left_whole(tmp_path: Path) -> None:
    model, mlp, attention = build("llama", tmp_path, Shifted)
    with LastLayer(model, attention).only(ROWS), torch.inference_mode():
        model(torch.zeros(1, 12, dtype=torch.long))
    assert mlp.rows == 12
