"""Lists that the host has made, on their way to the engine's device: one copy for all of them.

Every copy to a GPU from memory that is not pinned waits for the GPU, and every copy costs about 10 µs by itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# What torch asks of memory that is seen as another dtype.
_ALIGNMENT = 8


def send(device: torch.device, *parts: NDArray[np.generic]) -> list[Tensor]:
    """Tensors of the same shapes and dtypes on the device. On cpu they share the arrays' memory.

    Elsewhere the copy is asynchronous, in the order of the current stream: torch keeps the pinned memory until it is
    over.
    """
    if device.type == "cpu":
        return [torch.from_numpy(part) for part in parts]
    starts, end = [], 0
    for part in parts:
        starts.append(end)
        end += -(-part.nbytes // _ALIGNMENT) * _ALIGNMENT
    here = torch.empty(end, dtype=torch.uint8, pin_memory=True)
    memory = here.numpy()
    for start, part in zip(starts, parts, strict=True):
        memory[start : start + part.nbytes] = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
    there = here.to(device, non_blocking=True)
    return [
        there[start : start + part.nbytes].view(torch.from_numpy(part[:0]).dtype).view(part.shape)
        for start, part in zip(starts, parts, strict=True)
    ]


class Parcel:
    """Numbers that are noted one after another, and sent together."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._noted: list[Noted] = []

    def note(self, numbers: NDArray[Any]) -> Noted:
        noted = Noted(numbers)
        self._noted.append(noted)
        return noted

    def send(self) -> None:
        """Once. Nothing is copied if nothing was noted."""
        if not self._noted:
            return
        for noted, there in zip(self._noted, send(self._device, *(noted.here for noted in self._noted)), strict=True):
            noted.there = there


class Noted:
    def __init__(self, here: NDArray[Any]) -> None:
        self.here = here
        # On the device, once the parcel is sent.
        self.there: Tensor
