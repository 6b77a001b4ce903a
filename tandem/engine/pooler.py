"""From hidden states to embeddings."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tandem.engine.scheduler import Chunk
from tandem.engine.sequence import Embedded, Sequence


@dataclass
class Pooler:
    """Sums up each sequence's hidden states over its chunks, in float64: how it was cut leaves no trace in float32."""

    _sums: WeakKeyDictionary[Sequence, Tensor] = field(default_factory=WeakKeyDictionary)

    def pool(self, hidden_ExD: Tensor, chunks: Rows[Chunk]) -> list[tuple[Sequence, Embedded]]:
        """The embeddings that are whole now. hidden: one row for each position in `pooled` of each chunk, in order."""
        whole, sums = [], dict[Sequence, Tensor]()
        rows = torch.split_with_sizes(hidden_ExD.double(), [len(chunk.pooled) for chunk in chunks])
        for chunk, hidden in zip(chunks, rows, strict=True):
            sequence = chunk.sequence
            total_D = hidden.sum(dim=0) + self._sums.get(sequence, 0.0)
            if chunk.completes_prompt:
                whole.append((sequence, Embedded(_vector(total_D, sequence))))
            else:
                sums[sequence] = total_D
        # Last: a step that fails before leaves no trace, and may be tried again.
        self._sums.update(sums)
        for sequence, _ in whole:
            self._sums.pop(sequence, None)
        return whole


def _vector(total_D: Tensor, sequence: Sequence) -> bytes:
    assert sequence.embed is not None
    vector_D = total_D / (sequence.prompt_len if sequence.averages else 1)
    if sequence.embed.normalize:
        vector_D = torch.nn.functional.normalize(vector_D, dim=0)
    return vector_D.float().cpu().numpy().astype("<f4").tobytes()
