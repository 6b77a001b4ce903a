"""A CUDA device without a GPU: tensors on it are fake, with a dtype, a shape and a device, and no numbers.

Tensors on cpu are real. What leaves the device is zeros. Whatever would be wrong on a GPU, and torch's fake tensors let
pass, is refused here: see `Device` for copies, `check_arguments` for the attention kernel.
"""

from __future__ import annotations

import ctypes
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

ROOT = Path(__file__).resolve().parents[2]
OURS = tuple(str(ROOT / room) for room in ("tandem", "kv_transfer"))
aten = torch.ops.aten
# How a tensor comes to another device.
_COPIES = {aten._to_copy.default, aten.copy_.default}
_COMPOSED = {
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.dtype,
    aten.to.other,
    aten.item.default,
    aten.is_nonzero.default,
}
# What a GPU must be waited for: how many there are decides the result's shape.
_SIZED_BY_VALUES = {aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.unique_dim.default}
# Those that torch itself sends to the GPU when they are given a number: a copy that no line of ours names.
_NUMBER_IS_COPIED = {aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar}
# What is read of the device: every check holds, every error is none.
_NUMBERS = {torch.bool: True}
FREE, TOTAL = 64 << 20, 80 << 20


class Misuse(AssertionError):
    """What would fail, or wait in secret, on a GPU."""


class Device(TorchDispatchMode):
    """Above fake tensors: notes copies between host and device, and keeps the two apart."""

    def __init__(self, fakes: FakeTensorMode) -> None:
        super().__init__()
        self._fakes = fakes
        # Lines of ours that copied to the device, and from it.
        self.copied_in: list[str] = []
        self.copied_out: list[str] = []

    def forget(self) -> None:
        self.copied_in.clear()
        self.copied_out.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _COMPOSED:  # in inference mode they come whole
            with self:
                return func.decompose(*args, **kwargs)
        if _is(kwargs.get("device"), "meta"):  # the lent guard's word for a device without an index
            kwargs["device"] = torch.device("cuda", 0)
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        fake = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
        real = [tensor for tensor in tensors if not isinstance(tensor, FakeTensor)]
        if func is aten._local_scalar_dense.default and fake:
            self.copied_out.append(_where())
            return _NUMBERS.get(fake[0].dtype, 0.0 if fake[0].is_floating_point() else 0)
        if func in _SIZED_BY_VALUES and fake:
            raise Misuse(f"{func} waits for the device: {_where()}")
        if func in _NUMBER_IS_COPIED and fake:
            self.copied_in.append(_where())
        if not fake and not _is(kwargs.get("device"), "cuda"):
            return self._on_host(func, args, kwargs)
        if func in _COPIES:
            return self._copy(func, args, kwargs, fake, real)
        if any(tensor.dim() for tensor in real):
            raise Misuse(f"{func} mixes a tensor on cpu with one on cuda: {_where()}")
        # Numbers in tensors on cpu go along with a kernel's launch.
        args, kwargs = tree_map_only(Tensor, self._faked, (args, kwargs))
        return func(*args, **kwargs)

    def _on_host(self, func: Any, args: Any, kwargs: Any) -> Any:
        kwargs.pop("pin_memory", None)
        with unset_fake_temporarily():
            return func(*args, **kwargs)

    def _copy(self, func: Any, args: Any, kwargs: Any, fake: list[Tensor], real: list[Tensor]) -> Any:
        target = args[0] if func is aten.copy_.default else None
        to_host = not isinstance(target, FakeTensor) if target is not None else _is(kwargs.get("device"), "cpu")
        if to_host and fake:
            self.copied_out.append(_where())
            with unset_fake_temporarily():
                if target is not None:
                    return target.zero_()
                return torch.zeros(fake[0].shape, dtype=kwargs.get("dtype") or fake[0].dtype)
        if real:
            self.copied_in.append(_where())
        args, kwargs = tree_map_only(Tensor, self._faked, (args, kwargs))
        kwargs.pop("non_blocking", None)
        return func(*args, **kwargs)

    def _faked(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            # No values: what is known of a constant would let a check pass that needs the device.
            tensor.constant = None
            return tensor
        return self._fakes.from_tensor(tensor)


def _is(device: Any, kind: str) -> bool:
    return device is not None and torch.device(device).type == kind


def _where() -> str:
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.startswith(OURS):
            return f"{frame.filename.removeprefix(str(ROOT) + '/')}:{frame.lineno}"
    inner = [frame for frame in traceback.extract_stack() if "transformers/models" in frame.filename]
    return f"{inner[-1].filename}:{inner[-1].lineno}" if inner else "elsewhere"


def check_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int] = (-1, -1),
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
    enable_gqa: bool | None = None,
    scale: float | None = None,
    torch_version: tuple[int, int] = (2, 13),
) -> None:
    """What flash attention 2 refuses on a GPU, and its fake tensors' function does not look at. Raises Misuse.

    enable_gqa: None where the torch at hand does not ask.
    """
    sequences, paged = cu_seq_q.shape[0] - 1, block_table is not None

    def must(holds: bool, words: str) -> None:
        if not holds:
            raise Misuse(f"varlen_attn: {words}")

    must(cu_seq_k is not None, "cu_seq_q and cu_seq_k must be both set or both not set")
    must(paged == (seqused_k is not None), "block_table and seqused_k come together")
    must(num_splits is None or torch_version >= (2, 13), "num_splits needs flash attention 3 before torch 2.13")
    must(not paged or torch_version >= (2, 12), "torch 2.11 takes no pages")
    tensors = {"query": query, "key": key, "value": value, "cu_seq_q": cu_seq_q, "cu_seq_k": cu_seq_k}
    tensors |= {"seqused_k": seqused_k, "block_table": block_table}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        must(tensor.device.type == "cuda", f"{name} is on {tensor.device}")
        must(tensor.stride(-1) == 1 or tensor.shape[-1] == 1, f"the last dimension of {name} is not contiguous")
    must(query.dtype in (torch.float16, torch.bfloat16), f"queries are {query.dtype}")
    must(key.dtype == value.dtype == query.dtype, f"{query.dtype} queries, {key.dtype} keys, {value.dtype} values")
    for name in ("cu_seq_q", "cu_seq_k", "seqused_k", "block_table"):
        numbers = tensors[name]
        must(numbers is None or numbers.dtype == torch.int32, f"{name} is {numbers is not None and numbers.dtype}")
        must(numbers is None or numbers.is_contiguous(), f"{name} is not contiguous")
    must(tuple(cu_seq_k.shape) == (sequences + 1,), f"cu_seq_k is {tuple(cu_seq_k.shape)} for {sequences} sequences")
    must(seqused_k is None or tuple(seqused_k.shape) == (sequences,), "seqused_k is not one number a sequence")
    must(query.dim() == 3, f"queries have {query.dim()} dimensions")
    must(key.dim() == value.dim() == (4 if paged else 3), f"keys have {key.dim()} dimensions")
    must(key.shape == value.shape, "keys and values differ in shape")
    _, heads, dim = query.shape
    must(key.shape[-1] == dim and dim % 8 == 0 and dim <= 256, f"head_dim is {dim}, of keys {key.shape[-1]}")
    must(heads % key.shape[-2] == 0, f"{heads} query heads, {key.shape[-2]} key heads")
    must(enable_gqa is not False or heads == key.shape[-2], "fewer key heads without enable_gqa")
    if block_table is not None:
        must(key.shape[1] % 256 == 0, f"pages of {key.shape[1]} tokens")
        must(block_table.shape[0] == sequences, f"block_table has {block_table.shape[0]} rows for {sequences}")
        must(block_table.shape[1] * key.shape[1] >= max_k, "block_table is too narrow for max_k")
    must(isinstance(scale, float), "no scale: the kernel would take its own")
    must(1 <= max_q <= query.shape[0] and max_q <= max_k, f"max_q {max_q}, max_k {max_k}, {query.shape[0]} rows")
    left, right = window_size
    must(right == 0 or (max_q == 1 and (left, right) == (-1, -1)), f"window {window_size} shows a row what follows it")
    must(max_q > 1 or left >= 0 or right == -1, "a window of (-1, 0) for decode rows reads keys once per query head")


@contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """Inside, `cuda` is a device of the H200's kind."""
    for name, answer in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: "fake",
        "mem_get_info": lambda device=None: (FREE, TOTAL),
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: None,
        "current_stream": lambda device=None: _Stream(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    # transformers looks at no numbers of what it takes for a trace.
    monkeypatch.setattr("transformers.masking_utils.is_tracing", lambda *_: False)
    fakes = _Fakes()
    device = Device(fakes)
    with _lent_guard(), fakes, device:
        yield device


class _Stream:
    def synchronize(self) -> None:
        pass


class _Fakes(FakeTensorMode):
    # Whatever the patched torch.cuda says, there is no device to talk to.
    avoid_device_init = True  # type: ignore[assignment]


@contextmanager
def _lent_guard() -> Iterator[None]:
    """Torch built without CUDA has nothing that says which device is the current one; the meta device's says nothing
    of weight, and is lent."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    kinds = torch._C._autograd.DeviceType
    guards = (ctypes.c_void_p * 20).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    cuda, meta = int(kinds.CUDA), int(kinds.Meta)
    own = guards[cuda]
    guards[cuda] = own or guards[meta]
    try:
        yield
    finally:
        guards[cuda] = own


def checked(function: Callable[..., Tensor], **rules: Any) -> Callable[..., Tensor]:
    """`varlen_attn` behind check_arguments."""

    def varlen_attn(*args: Any, **kwargs: Any) -> Tensor:
        check_arguments(*args, **kwargs, **rules)
        return function(*args, **kwargs)

    return varlen_attn
