"""The ways to divide K workers."""

from __future__ import annotations

from collections.abc import Sequence

from loadtest.compare.model import ServiceShape


def all_shapes(workers: int, step_tokens: Sequence[int]) -> list[ServiceShape]:
    """All colocated, once for each step budget; and x prefill with y decode workers for every x + y = `workers`.

    A prefill worker delays nobody's next token, so the split shapes take the largest budget.
    """
    colocated = [ServiceShape(colocated=workers, step_tokens=budget) for budget in step_tokens]
    most = max(step_tokens)
    split = [ServiceShape(prefill=count, decode=workers - count, step_tokens=most) for count in range(1, workers)]
    return colocated + split
