"""What the machine can do at best, measured in the same run as the engine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Roofs:
    """Medians of a few runs."""

    # Reading memory, bytes/s.
    read_bytes_s: float
    # Matrix products with many rows, FLOP/s.
    flop_s: float

    def describe(self) -> str:
        return f"reads {self.read_bytes_s / 1e9:.1f} GB/s, matrix products {self.flop_s / 1e9:.0f} GFLOP/s"


def measure_roofs(device: str, dtype: torch.dtype) -> Roofs:
    """With the threads that torch has now."""
    rows, inner = (1024, 2048) if device == "cpu" else (8192, 8192)
    left, right = (torch.randn(rows, inner, device=device).to(dtype) for _ in range(2))
    big = torch.ones((256 << 20) if device == "cpu" else (2 << 30), dtype=torch.uint8, device=device)
    words = big.view(torch.float32)
    with torch.inference_mode():
        product_s = _seconds(lambda: left @ right.T, device)
        if device == "cpu" and dtype == torch.float32:
            # Weights packed beforehand multiply faster than plain ones: that is the roof, with whichever layout.
            packed = torch.ops.mkldnn._reorder_linear_weight(right, rows)
            product_s = min(product_s, _seconds(lambda: _packed_product(left, packed), device))
        read_s = _seconds(words.sum, device)
    return Roofs(big.numel() / read_s, 2 * rows * rows * inner / product_s)


def _packed_product(left: torch.Tensor, packed: torch.Tensor) -> object:
    return torch.ops.mkldnn._linear_pointwise(left, packed, None, "none", [], "")


def _seconds(work: Callable[[], object], device: str) -> float:
    times = []
    for _ in range(8):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])
