"""The ways to divide K workers."""

from __future__ import annotations

from collections.abc import Sequence

from loadtest.compare.model import Shape


def all_shapes(workers: int, step_tokens: Sequence[int]) -> list[Shape]:
    """All colocated, once for each step budget; and x prefill with y decode workers for every x + y = `workers`.

    A prefill worker delays nobody's next token, so the split shapes take the largest budget.
    """
    colocated = [Shape(colocated=workers, step_tokens=budget) for budget in step_tokens]
    split = [
        Shape(prefill=prefill, decode=workers - prefill, step_tokens=max(step_tokens)) for prefill in range(1, workers)
    ]
    return colocated + split
