"""A CUDA GPU as a backend: flash attention over pages where the torch at hand has it, one pinned copy each way."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tandem.engine.backends.backend import Attention, Backend, DeviceLost, first_line
from tandem.engine.backends.cuda.attention import CudaAttention, why_not_flash, why_not_pages
from tandem.engine.backends.cuda.gpus import seen
from tandem.engine.batch import AttentionOptions, PagedBatch
from tandem.engine.kv_cache import DTYPES
from tandem.errors import ConfigError
from tandem.out_of_memory import is_out_of_memory
from tandem.types import Fingerprint

log = logging.getLogger(__name__)

# Share of the GPU's memory that is left alone: for what torch's allocator cannot place, and for libraries.
SPARE_SHARE = 0.05
# What torch asks of memory that is seen as another dtype.
_ALIGNMENT = 8


class CudaBackend(Backend):
    name = "cuda"
    dtype = "auto"
    block_size = 256

    def require_device(self) -> None:
        if not torch.cuda.is_available():
            raise ConfigError(
                f"engine.device is cuda, but torch sees no CUDA device here{seen()}", field="engine.device"
            )
        name = torch.cuda.get_device_name()
        try:
            torch.zeros(1, device="cuda").add_(1)
            torch.cuda.synchronize()
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise ConfigError(
                    f"{name} has no memory left: another process has all of it", field="engine.device"
                ) from None
            if "no kernel image" not in str(error):
                raise DeviceLost(f"{name} does not compute: {first_line(error)}") from error
            major, minor = torch.cuda.get_device_capability()
            built = ", ".join(torch.cuda.get_arch_list())
            raise ConfigError(
                f"this torch ({torch.__version__}) is built for {built}, and {name} is sm_{major}{minor}",
                field="engine.device",
            ) from None

    def peak_bytes(self, run: Callable[[], object]) -> int:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def bytes_left(self, peak: int) -> int:
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        room = max(0, free - peak - int(SPARE_SHARE * total))
        log.info(
            "of %d MiB on the GPU %d are free, and the largest step takes %d: %d are for KV",
            *(total >> 20, free >> 20, peak >> 20, room >> 20),
        )
        return room

    def attention_obstacles(self, fingerprint: Fingerprint, options: set[AttentionOptions]) -> set[str]:
        dtype, capability = DTYPES[fingerprint.dtype], torch.cuda.get_device_capability()
        layers = (why_not_flash(dtype, fingerprint.head_dim, kind, capability) for kind in options)
        return {why for why in (*layers, why_not_pages(fingerprint.block_size)) if why}

    def send(self, *parts: NDArray[np.generic]) -> list[Tensor]:
        """In the order of the current stream: torch keeps the pinned memory until the copy is over.

        Every copy from memory that is not pinned waits for the GPU, and every copy costs about 10 µs by itself.
        """
        starts, end = [], 0
        for part in parts:
            starts.append(end)
            end += -(-part.nbytes // _ALIGNMENT) * _ALIGNMENT
        here = torch.empty(end, dtype=torch.uint8, pin_memory=True)
        memory = here.numpy()
        for start, part in zip(starts, parts, strict=True):
            memory[start : start + part.nbytes] = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
        there = here.to("cuda", non_blocking=True)
        return [
            there[start : start + part.nbytes].view(torch.from_numpy(part[:0]).dtype).view(part.shape)
            for start, part in zip(starts, parts, strict=True)
        ]

    def plan_attention(self, batch: PagedBatch, options: AttentionOptions) -> Attention:
        return CudaAttention(batch, options)

    def why_lost(self) -> str:
        if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            return ""
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            return first_line(error)
        return ""

    def free_memory(self) -> None:
        torch.cuda.empty_cache()
