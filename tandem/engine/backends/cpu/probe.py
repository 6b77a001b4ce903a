"""How a part of a model is compared with what is to replace it: on random rows, up to fp32 reassociation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tandem.engine.loading.failures import in_words, of_the_machine

# Largest difference that we accept, as a share of the largest value of the same row of the original's output.
TOLERANCE = 1e-5
# One scale for each row of a random input: the small ones show a wrong epsilon, the large ones a wrong activation.
_SCALES = (1.0, 10.0, 0.1, 0.01, 0.001)
# The random input is taken once, and so many times over: few rows and many go different ways.
REPEATS = (1, 12)


class RefusedError(Exception):
    """The module has the looks of a known kind, but must stay as it is."""


@contextmanager
def trial() -> Iterator[None]:
    """What a model's own code raises inside is a RefusedError: it may want other arguments, and say so in any way."""
    try:
        yield
    except RefusedError:
        raise
    except Exception as error:
        if of_the_machine(error):
            raise
        raise RefusedError(f"cannot be tried: {in_words(error)}") from error


def random_rows(width: int) -> Tensor:
    return torch.randn(len(_SCALES), width) * torch.tensor(_SCALES).unsqueeze(1)


def require_same(want: Tensor, got: Tensor) -> None:
    if not isinstance(want, Tensor) or want.shape != got.shape:
        raise RefusedError("returns something else")
    scale = want.abs().amax(dim=-1, keepdim=True)
    if not bool(((got - want).abs() <= TOLERANCE * scale).all()):
        raise RefusedError("computes something else")
