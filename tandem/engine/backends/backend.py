"""What a device does for the engine: the only place where devices differ. docs/extend.md tells how to write one."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tandem.config import EngineConfig
from tandem.engine.backends.cores import usable_cores
from tandem.engine.backends.torch_attention import TorchAttention, write_kv
from tandem.engine.batch import AttentionOptions, PagedBatch
from tandem.out_of_memory import is_out_of_memory
from tandem.types import Fingerprint

# So many bytes of memory for a KV pool, for as long as the buffer lives. Raises MemoryError or OSError.
Allocate = Callable[[int], memoryview]
# (query [T, H, D], key [T, K, D], value [T, K, D], K pool [N, P, K, D], V pool) -> [T, H, D]: one layer's attention for
# all rows of a step. Keys and values are in the pools already; the step's own are given beside them.
Attention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class Backend(Protocol):
    """One device. It keeps nothing of a model or a step; shape letters are those of batch.py.

    A backend inherits from it what it has no need of.
    """

    # As engine.device and torch call it.
    name: str
    # Dtype of weights and KV where model.dtype is auto; "auto": as the checkpoint's files say.
    dtype: torch.dtype | str
    # Tokens of a KV block where engine.block_size is 0.
    block_size: int

    def prepare_process(self) -> None:
        """Settings of the whole process, before a model is loaded."""
        return

    def require_device(self) -> None:
        """Raises ConfigError unless this torch can compute on the device, DeviceLost when it does not compute."""
        return

    def prepare_model(self, model: nn.Module) -> None:
        """Replaces parts of a loaded model, in place, by faster ones that compute the same."""
        return

    def restore_layers(self, model: nn.Module) -> bool:
        """Undoes what prepare_model did to whole layers; whether it had done anything."""
        return False

    def settle(self, weights_bytes: int) -> None:
        """Called once, when weights and KV pool are where they stay."""
        return

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, allocate: Allocate | None) -> Tensor:
        """Memory of a KV pool; in what `allocate` gives, where the device can compute in the host's memory."""
        return torch.empty(shape, dtype=dtype, device=self.name)

    def peak_bytes(self, run: Callable[[], object]) -> int:
        """Memory that a call takes beside what is there before, at most. Like bytes_left, it is asked where the
        configuration leaves the size of the KV pool open."""
        raise NotImplementedError

    def bytes_left(self, peak: int) -> int:
        """Memory for a KV pool beside what is there now and the `peak` of a step."""
        raise NotImplementedError

    def attention_obstacles(self, fingerprint: Fingerprint, options: set[AttentionOptions]) -> set[str]:
        """Why attention does not read the pool's blocks where they lie, but gathers them first; empty if it does, for
        layers of these kinds."""
        return set()

    def send(self, *parts: NDArray[np.generic]) -> list[Tensor]:
        """Tensors of the same shapes and dtypes on the device: all in one copy, for which nobody waits."""
        raise NotImplementedError

    def write_kv(
        self, key_TxKxD: Tensor, value_TxKxD: Tensor, k_pool_NxPxKxD: Tensor, v_pool_NxPxKxD: Tensor, batch: PagedBatch
    ) -> None:
        """Puts a step's keys and values into their slots of a layer's pools."""
        write_kv(key_TxKxD, value_TxKxD, k_pool_NxPxKxD, v_pool_NxPxKxD, batch)

    def plan_attention(self, batch: PagedBatch, options: AttentionOptions) -> Attention:
        """The attention of one step, for all of its layers that ask for the same: asked once a step."""
        return TorchAttention(batch, options)

    def why_lost(self) -> str:
        """Why the device cannot be used any more; empty if it can. Waits for the device."""
        return ""

    def free_memory(self) -> None:
        """Gives back to the device what torch keeps for later."""
        return


# By engine.device. Imported when asked for: one device's kernels must not be needed, or compiled, on another.
BACKENDS = {
    "cpu": "tandem.engine.backends.cpu.backend:CpuBackend",
    "cuda": "tandem.engine.backends.cuda.backend:CudaBackend",
}


@cache
def backend_for(device: str) -> Backend:
    module, name = BACKENDS[device].split(":")
    made: Backend = getattr(import_module(module), name)()
    return made


def tune_process(config: EngineConfig) -> None:
    """Settings of the whole process; entry points call this once, before the model is loaded."""
    torch.set_num_threads(config.threads or len(usable_cores()))
    backend_for(config.device).prepare_process()


class DeviceLost(RuntimeError):
    """Nothing can be computed on the device any more: a GPU's error stays, and every later call raises it again.

    A new process may do better.
    """


def is_lost(error: BaseException, backend: Backend) -> bool:
    """Whether an error of a step leaves the device unusable. Waits for the device."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, torch.AcceleratorError) and not is_out_of_memory(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    # Libraries raise errors of their own for it.
    return backend.why_lost() != ""


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
