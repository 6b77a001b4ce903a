"""Which errors say that memory was wanting, of a device or of the host."""

from __future__ import annotations

import torch

# torch has a class of its own for its own allocations on a GPU alone: these are the driver's, cuBLAS's, and the host's.
_WORDS = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """What was asked for did not come to be, and all else is as it was."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)
