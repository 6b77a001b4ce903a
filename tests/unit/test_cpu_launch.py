"""Kernels are compiled anew when code that they hold has changed, and only then; operands have names."""

from __future__ import annotations

import importlib
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numba
import pytest
import torch

from tandem.engine.backends.cpu.kernels import launch
from tandem.engine.backends.cpu.kernels.launch import Kernel, operands, slots

KERNELS = Path(launch.__file__).parent


# A kernel that calls a function of another file, which calls `silu_multiply` of parts.py.
HELPER = """
from copied.parts import jit, silu_multiply
@jit
def gate_one(gate: int, up: int) -> None:
    silu_multiply(gate, up, 1)
"""
KERNEL = """
import torch
from copied.helper import gate_one
from copied.launch import Kernel, addresses, operands, slots
@operands
class GateOperands:
    gate, up = slots(2)
@Kernel
def _gate(op: GateOperands) -> None:
    gate_one(op.gate, op.up)
def gated(gate: torch.Tensor, up: torch.Tensor) -> float:
    op = GateOperands()
    op.gate, op.up = addresses(gate, up)
    _gate.launch(op, threads=1)
    return float(gate)
"""


class Copied:
    """The folder of kernels as a package of its own, `copied`, that can be edited, with KERNEL in it."""

    def __init__(self, parent: Path) -> None:
        self._folder = parent / "copied"
        self._folder.mkdir()
        for path in KERNELS.glob("*.py"):
            (self._folder / path.name).write_text(path.read_text().replace(launch.__package__, "copied"))
        (self._folder / "helper.py").write_text(HELPER)
        (self._folder / "kernel.py").write_text(KERNEL)

    def edit(self, name: str, old: str, new: str) -> None:
        text = (self._folder / name).read_text()
        assert text.count(old) == 1
        (self._folder / name).write_text(text.replace(old, new))

    def gated(self) -> float:
        """silu(1) * 2, as a new process would compute it."""
        for name in [name for name in sys.modules if name.startswith("copied")]:
            del sys.modules[name]
        kernel: Any = importlib.import_module("copied.kernel")
        return float(kernel.gated(torch.ones(()), torch.tensor(2.0)))

    def compiled(self) -> dict[str, int]:
        """What lies in numba's cache, and when it was written."""
        return {path.name: path.stat().st_mtime_ns for path in (self._folder / "__pycache__").glob("*.nb?")}


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Copied:
    monkeypatch.syspath_prepend(str(tmp_path))
    # Python's own cache misses an edit within a second.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    return Copied(tmp_path)


def test_an_edit_of_what_a_kernel_includes_compiles_it_anew(copied: Copied) -> None:
    want = 2 * torch.nn.functional.silu(torch.ones(())).item()
    assert copied.gated() == pytest.approx(want)
    compiled = copied.compiled()
    assert compiled
    copied.edit("matmul.py", "_FEW_ROWS = 48", "_FEW_ROWS = 49")
    assert copied.gated() == pytest.approx(want)
    assert copied.compiled() == compiled, "compiled again, though nothing that it includes has changed"
    copied.edit("parts.py", "* (above / (np.float32(1.0) + e)) *", "* (above / (np.float32(3.0) + e)) *")
    assert copied.gated() == pytest.approx(2 / (3 + math.exp(-1)))
    assert len(copied.compiled()) == 2 * len(compiled)
    copied.edit("parts.py", "np.float32(3.0) + e", "np.float32(1.0) + e")
    assert copied.gated() == pytest.approx(want)
    assert len(copied.compiled()) == 2 * len(compiled), "what was compiled before an edit is there when it is undone"


DECODE = """
import torch
from tandem.engine.backends.cpu.attention import CpuAttention
from tandem.engine.batch import AttentionOptions, PagedBatch
torch.manual_seed(3)
lens = torch.full((8,), 256, dtype=torch.int32)
table, rows = torch.arange(128, dtype=torch.int32).view(8, 16), torch.arange(9, dtype=torch.int32)
batch = PagedBatch(8, rows.tolist(), lens.tolist(), table, lens, torch.zeros(8, dtype=torch.int64), rows)
query, pools = torch.randn(8, 9, 64), torch.randn(2, 128, 16, 3, 64)
out = CpuAttention(batch, AttentionOptions(scale=0.2))(query, query[:, :3], query[:, :3], *pools)
print(hash(out.numpy().tobytes()))
"""


def test_what_is_compiled_and_what_is_loaded_compute_the_same_bits(tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONHASHSEED": "0"}
    command = [sys.executable, "-c", DECODE]
    cold, warm = (
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True) for _ in range(2)
    )
    assert list(tmp_path.rglob("*.nbc")), "nothing was cached"
    assert cold.stdout == warm.stdout


def test_kernels_compile_where_no_cache_can_be_written(tmp_path: Path) -> None:
    """A read-only install and a home that is not there: compile without a cache rather than fail."""
    (tmp_path / "main.py").write_text(
        "import numba.core.caching as c\n"
        "for impl in (c.CompileResultCacheImpl,): impl._locator_classes = []\n"
        f"from {launch.__name__} import Kernel, operands, slots\n"
        "@operands\n"
        "class Said: (word,) = slots(1)\n"
        "@Kernel\n"
        "def say(op: Said): op.word = 1\n"
        "said = Said(); say.launch(said, threads=2); print('ran', said.word)\n"
    )
    environment = {**os.environ, "HOME": str(tmp_path / "absent")}
    command = [sys.executable, str(tmp_path / "main.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "ran 1", done.stderr


@operands
class Named:
    first, second = slots(2)


def test_an_operand_that_the_kernel_does_not_have_is_refused() -> None:
    told = Named()
    told.first, told.second = 1, 2
    with pytest.raises(AttributeError, match="third"):
        told.third = 3  # type: ignore[attr-defined]

    def reads_another(op: Named) -> None:
        op.first = op.third  # type: ignore[attr-defined]

    with pytest.raises(Exception, match="third"):
        Kernel(reads_another)


def test_the_kernel_of_the_docs_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "extend.md").read_text(encoding="utf-8")
    [code] = re.findall(
        r"^```python\n(.*?)^```", page.split("## A kernel\n")[1].split("\n## ")[0], re.DOTALL | re.MULTILINE
    )
    (tmp_path / "scaling.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    x = torch.randn(100, 7)
    want = x * 3
    scaling: Any = importlib.import_module("scaling")
    scaling.scale(x, 3.0)
    assert torch.equal(x, want)
