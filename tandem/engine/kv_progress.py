"""Tells what KV a step has written while the step goes on, so that a layer can leave while the next is computed."""

from __future__ import annotations

from collections.abc import Callable

from tandem.engine.scheduler import StepPlan
from tandem.engine.sequence import Emission, KVWritten
from tandem.types import Fingerprint


class KVProgress:
    """The prompt KV of one step. Layers are told together until they make about `tell_bytes`: every telling wakes the
    event loop, and every range becomes a frame at least."""

    def __init__(
        self,
        plan: StepPlan,
        fingerprint: Fingerprint,
        tell_bytes: int,
        publish: Callable[[list[Emission]], None],
    ) -> None:
        self._chunks = plan.prefills
        self._tell_bytes = tell_bytes
        self._publish = publish
        tokens = sum(chunk.end - chunk.start for chunk in self._chunks)
        self._layer_bytes = tokens * fingerprint.token_bytes // fingerprint.num_layers
        # So many layers were told of; those before `_stop` are written.
        self.told = self._stop = plan.written

    def layer_written(self, layer: int) -> None:
        """Layers come in order: the loader refuses models that number them otherwise."""
        self._stop = max(self._stop, layer + 1)
        if self._chunks and (self._stop - self.told) * self._layer_bytes >= self._tell_bytes:
            self._publish(self.rest())

    def rest(self) -> list[Emission]:
        """What has not been told, and is from now on."""
        layers, self.told = range(self.told, self._stop), self._stop
        return [(chunk.sequence, KVWritten(layers, chunk.start, chunk.end)) for chunk in self._chunks if layers]
