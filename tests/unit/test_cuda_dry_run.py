"""The engine on a CUDA device that is not there: right devices, dtypes, shapes and arguments, and few copies.

Numbers do not exist here; tests/gpu/ has those, for whoever has a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_cuda import FREE, TOTAL, Device, Misuse, checked, fake_cuda
from model_zoo import ARCHITECTURES
from torch import Tensor
from transformers import AutoConfig

from kv_transfer.frames.cells import Cells
from kv_transfer.frames.int8 import Int8
from kv_transfer.frames.layout import KVLayout
from tandem.config import parse_config
from tandem.engine.backends.backend import backend_for
from tandem.engine.backends.cuda import attention as cuda_attention
from tandem.engine.backends.cuda.attention import FLASH, FlashFeatures
from tandem.engine.backends.cuda.backend import SPARE_SHARE, CudaBackend
from tandem.engine.engine import Engine
from tandem.engine.kv_cache import block_bytes
from tandem.engine.loading import kv_sizing
from tandem.engine.loading.self_check import _Case
from tandem.engine.sequence import Emission, Failed, NewToken
from tandem.engine.sequence import Sequence as EngineSequence
from tandem.errors import ConfigError, TransferFailed
from tandem.types import EmbedParams, EngineRequest, Pooling, SamplingParams

# Tokens of each answer.
NEW = 4
GREEDY = SamplingParams(max_tokens=NEW, ignore_eos=True)
SAMPLINGS = [
    GREEDY,
    SamplingParams(max_tokens=NEW, ignore_eos=True, temperature=0.8, seed=3),
    SamplingParams(max_tokens=NEW, ignore_eos=True, temperature=0.8, top_k=5, top_p=0.9, min_p=0.1, seed=3),
    SamplingParams(
        max_tokens=NEW,
        min_tokens=2,
        repetition_penalty=1.2,
        presence_penalty=0.1,
        frequency_penalty=0.1,
        logit_bias={7: 2.0},
    ),
    SamplingParams(max_tokens=NEW, ignore_eos=True, logprobs=3),
]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    # Whether `generate` goes on is read of numbers that do not exist.
    monkeypatch.setattr("tandem.engine.loading.self_check._Check._generated", _as_if_generated)
    monkeypatch.setattr(cuda_attention, "varlen_attn", checked(cuda_attention.varlen_attn))
    with fake_cuda(monkeypatch) as device:
        yield device


def _as_if_generated(check: Any, prompt: list[int], tokens: int) -> _Case:
    ids = [*prompt, *range(1, tokens)]
    return _Case(ids, list(range(len(ids))), check._own(ids, None)[-tokens:])


def model_of(architecture: str, folder: Path, **changes: Any) -> Path:
    AutoConfig.for_model(architecture, **{**ARCHITECTURES[architecture], **changes}).save_pretrained(folder)
    return folder


class Run:
    def __init__(self, model: Path, device: Device, dtype: str = "bfloat16", **engine: Any) -> None:
        settings = {
            "model": {"path": str(model), "load_format": "dummy", "dtype": dtype},
            "engine": {"device": "cuda", "kv_memory_mib": 16, "max_step_tokens": 96, **engine},
        }
        self.device = device
        self.emitted: list[Emission] = []
        self.engine = Engine(parse_config(settings), self.emitted.extend)

    def add(self, prompt: Sequence[int], sampling: SamplingParams = GREEDY) -> None:
        request = EngineRequest(str(len(prompt)), tuple(prompt), sampling)
        table = self.engine.reserve(request, prefill_here=True)
        self.engine.add(EngineSequence(request, lambda event: None, decode_here=True, table=table))

    def embed(self, prompt: Sequence[int]) -> EngineSequence:
        """Its blocks are the caller's to release."""
        request = EngineRequest("embed", tuple(prompt), SamplingParams(max_tokens=1))
        embed = EmbedParams(pooling=Pooling.MEAN)
        sequence = EngineSequence(request, lambda event: None, decode_here=False, embed=embed)
        self.engine.add(sequence)
        return sequence

    def step(self) -> tuple[int, int]:
        """Copies to the device, and from it."""
        self.device.forget()
        self.engine.step()
        return len(self.device.copied_in), len(self.device.copied_out)

    def all(self) -> list[tuple[int, int]]:
        """Of each step that only decoded."""
        decoded = []
        while self.engine.has_work:
            prefills = self.engine.load.queued_prompt_tokens > 0
            copies = self.step()
            if not prefills:
                decoded.append(copies)
        assert [event for _, event in self.emitted if isinstance(event, Failed)] == []
        return decoded

    @property
    def new_tokens(self) -> int:
        return sum(isinstance(event, NewToken) for _, event in self.emitted)


@pytest.mark.parametrize(
    ("architecture", "layers", "dtype", "engine"),
    [
        ("llama", 2, "float16", {}),
        # A window, experts, and pages that the kernel does not take.
        ("mixtral", 1, "bfloat16", {"block_size": 16}),
        # Soft caps and a window: torch alone.
        ("gemma2", 1, "bfloat16", {}),
        ("gpt2", 1, "float32", {"block_size": 16}),
    ],
)
def test_every_kind_of_step(
    architecture: str, layers: int, dtype: str, engine: dict[str, Any], tmp_path: Path, device: Device
) -> None:
    """Prompts in one chunk and in several, beside decodes, every kind of sampling, an embedding."""
    run = Run(model_of(architecture, tmp_path, num_hidden_layers=layers), device, dtype, **engine)
    run.add(range(3, 30), SAMPLINGS[0])
    run.step()
    for sampling, prompt in zip(SAMPLINGS[1:], ([5, 6, 7], [9] * 5, [11], range(5, 85)), strict=True):
        run.add(prompt, sampling)
    embedded = run.embed(range(5, 40))
    decoded = run.all()
    assert run.new_tokens == NEW * len(SAMPLINGS)
    # The first one has every kind of sampling in it.
    assert len(decoded) >= 2
    assert decoded[0] == (2, 1)
    # What goes into a step, and what shapes its samples; the tokens.
    assert max(into for into, _ in decoded) <= 2, device.copied_in
    assert {out for _, out in decoded} == {1}, device.copied_out
    assert embedded.table is not None
    assert run.engine.pool.check_integrity().referenced == len(embedded.table.blocks)
    embedded.table.release()
    assert run.engine.pool.check_integrity().referenced == run.engine.num_live == 0


def _varlen_2_11(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: object = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    return torch.empty_like(query)


@pytest.mark.parametrize(("version", "function"), [("2.11.0+cu130", _varlen_2_11), ("2.12.1", None)])
def test_older_torch(
    version: str,
    function: Callable[..., Tensor] | None,
    tmp_path: Path,
    device: Device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = function or torch.nn.attention.varlen.varlen_attn
    major, minor = version.split(".")[:2]
    monkeypatch.setattr(cuda_attention, "FLASH", FlashFeatures.of(real, version))
    monkeypatch.setattr(cuda_attention, "varlen_attn", checked(real, torch_version=(int(major), int(minor))))
    run = Run(model_of("llama", tmp_path, num_hidden_layers=1), device)
    run.add([5, 6, 7])
    run.add([9] * 200)
    assert max(run.all()) <= (2, 1)
    assert run.new_tokens == 2 * NEW


def test_what_the_torch_at_hand_takes() -> None:
    assert FlashFeatures(window=True, pages=True, gqa=True, splits=torch.__version__ >= "2.13") == FLASH
    assert FlashFeatures.of(_varlen_2_11, "2.11.0") == FlashFeatures(window=True, pages=False, gqa=False, splits=False)
    assert not FlashFeatures.of(torch.nn.attention.varlen.varlen_attn, "2.12.0").splits


def test_the_pool_takes_what_the_largest_step_leaves(
    tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    run_step = kv_sizing.run_step
    monkeypatch.setattr(kv_sizing, "run_step", lambda plan, *rest: (steps.append(plan), run_step(plan, *rest)))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5 << 20)
    run = Run(model_of("llama", tmp_path, max_position_embeddings=400), device, kv_memory_mib=0, max_step_tokens=1000)
    (plan,) = steps
    assert plan.num_tokens == 1000
    assert len(plan.decodes) == 256
    assert [chunk.end for chunk in plan.prefills] == [400, 344]
    room = FREE - (5 << 20) - int(TOTAL * SPARE_SHARE)
    assert run.engine.pool.num_blocks == room // block_bytes(run.engine.fingerprint)
    run.add([5, 6, 7])
    run.all()
    assert run.new_tokens == NEW


# As torch's allocator says it, the driver, and cuBLAS.
NO_ROOM = [
    torch.OutOfMemoryError(),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@pytest.mark.parametrize("error", NO_ROOM)
def test_a_step_that_never_fits_is_said_before_anything_is_served(
    error: Exception, tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: Any) -> None:
        raise error

    monkeypatch.setattr(kv_sizing, "run_step", no_room)
    with pytest.raises(ConfigError, match=r"engine\.max_step_tokens \(96\) and engine\.max_running \(256\)"):
        Run(model_of("llama", tmp_path, num_hidden_layers=1), device, kv_memory_mib=0)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_kv_leaves_the_device_and_comes_to_it(dtype: str, device: Device) -> None:
    pool = torch.zeros(3, 2, 8, 16, 2, 32, dtype=getattr(torch, dtype), device="cuda")
    cells = Cells(pool, [5, 2, 7], range(1, 3), range(3, 40))
    payload, checksum = cells.pieces().gathered()
    assert len(payload) == 2 * 2 * 37 * 64 * pool.element_size()
    assert (len(device.copied_in), len(device.copied_out)) == (1, 1)  # where the cells are; the cells
    device.forget()
    assert cells.scatter(payload) == checksum
    assert (len(device.copied_in), len(device.copied_out)) == (2, 0)

    wire = Int8(KVLayout(3, 2, 32, 16, dtype))
    payload, checksum = wire.pieces(cells).gathered()
    assert len(payload) == wire.payload_bytes(2, cells.tokens)
    wire.write_on_device(cells, *wire.quantize_on_device(cells))


@pytest.mark.parametrize("error", NO_ROOM)
def test_a_frame_without_room_fails_its_transfer_alone(
    error: Exception, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: Any) -> None:
        raise error

    cells = Cells(torch.zeros(3, 2, 8, 16, 2, 32, device="cuda"), [5, 2, 7], range(1, 3), range(3, 40))
    payload, _ = cells.pieces().gathered()
    wire = Int8(KVLayout(3, 2, 32, 16, "float32"))
    monkeypatch.setattr(Cells, "_slot_view", no_room)
    for call in (
        cells.pieces,
        lambda: cells.scatter(payload),
        lambda: wire.pieces(cells),
    ):
        with pytest.raises(TransferFailed, match="no memory left for a KV frame"):
            call()


def _cpu_index(real: Any) -> Any:
    return lambda backend, *parts: [*backend_for("cpu").send(*parts[:2]), *real(backend, *parts[2:])]


def _wide_table(real: Any) -> Any:
    return lambda backend, *parts: real(backend, *(part.astype(np.int64) for part in parts))


def _no_keys(real: Any) -> Any:
    def varlen_attn(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, *rest: Any, **asked: Any) -> Tensor:
        answer: Tensor = real(query, key, value, starts, None, *rest[1:], **asked)
        return answer

    return varlen_attn


def _asked(**other: Any) -> Callable[[Any], Any]:
    return lambda real: lambda *arguments, **asked: real(*arguments, **{**asked, **other})


def _turned(real: Any) -> Any:
    return lambda query, *rest, **asked: real(query.transpose(1, 2).contiguous().transpose(1, 2), *rest, **asked)


@pytest.mark.parametrize(
    ("place", "name", "bug", "says"),
    [
        (CudaBackend, "send", _cpu_index, "mixes a tensor on cpu with one on cuda"),
        (CudaBackend, "send", _wide_table, "torch.int64"),
        (cuda_attention, "varlen_attn", _no_keys, "both set or both not set"),
        (cuda_attention, "varlen_attn", _asked(seqused_k=None), "come together"),
        (cuda_attention, "varlen_attn", _asked(enable_gqa=False), "without enable_gqa"),
        (cuda_attention, "varlen_attn", _asked(window_size=(-1, -1)), "shows a row what follows it"),
        (cuda_attention, "varlen_attn", _asked(scale=None), "no scale"),
        (cuda_attention, "varlen_attn", _turned, "is not contiguous"),
    ],
)
def test_bugs_are_caught(
    place: Any,
    name: str,
    bug: Callable[[Any], Any],
    says: str,
    tmp_path: Path,
    device: Device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Planted ones: this dry run can fail."""
    run = Run(model_of("llama", tmp_path, num_hidden_layers=2), device)
    monkeypatch.setattr(place, name, bug(getattr(place, name)))
    met: list[Exception] = []
    fail = run.engine._fail
    monkeypatch.setattr(run.engine, "_recover", lambda plan, told, error: (met.append(error), fail(plan, error), ())[2])
    run.add(range(5, 40))
    run.step()
    assert [says in str(error) for error in met] == [True], met


def test_a_copy_too_many_is_caught(tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    send = CudaBackend.send
    monkeypatch.setattr(CudaBackend, "send", lambda backend, *parts: [send(backend, part)[0] for part in parts])
    run = Run(model_of("llama", tmp_path, num_hidden_layers=1), device)
    run.add([5, 6, 7])
    assert max(run.all())[0] == 7
    with pytest.raises(Misuse, match="waits for the device"):
        torch.zeros(3, device="cuda").nonzero()
