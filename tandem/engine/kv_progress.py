"""Tells what KV a step has written while the step goes on, so that a layer can leave while the next is computed."""

from __future__ import annotations

from collections.abc import Callable

from tandem.engine.scheduler import Chunk
from tandem.engine.sequence import Emission, KVWritten
from tandem.types import Fingerprint


class KVProgress:
    """The prompt KV of one step. Layers are told together until they make about `tell_bytes`: every telling wakes the
    event loop, and every range becomes a frame at least."""

    def __init__(
        self,
        chunks: list[Chunk],
        fingerprint: Fingerprint,
        tell_bytes: int,
        publish: Callable[[list[Emission]], None],
        told: int = 0,
    ) -> None:
        """told: so many layers of these chunks were told before, by a step that failed and is tried again."""
        self._chunks = chunks
        self._tell_bytes = tell_bytes
        self._publish = publish
        tokens = sum(chunk.end - chunk.start for chunk in chunks)
        self._layer_bytes = tokens * fingerprint.token_bytes // fingerprint.num_layers
        # Written and not yet told.
        self._first = self._stop = told

    def layer_written(self, layer: int) -> None:
        """Layers come in order: the loader refuses models that number them otherwise."""
        self._stop = max(self._stop, layer + 1)
        if self._chunks and (self._stop - self._first) * self._layer_bytes >= self._tell_bytes:
            self._publish(self.rest())

    @property
    def told(self) -> int:
        """So many layers."""
        return self._first

    def rest(self) -> list[Emission]:
        """What has not been told."""
        layers, self._first = range(self._first, self._stop), self._stop
        return [(chunk.sequence, KVWritten(layers, chunk.start, chunk.end)) for chunk in self._chunks if layers]
