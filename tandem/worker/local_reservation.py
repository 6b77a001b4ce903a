"""The colocated handoff: prefill computes into what decode reserved, and only the block table changes hands."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext

from kv_transfer.base import TransferSummary
from tandem.engine.sequence import EngineEvent, Failed, Listener, NewToken, Sequence
from tandem.errors import TandemError, TransferFailed
from tandem.worker.reservation import Reservation, ReservationState


class LocalReservation(Reservation):
    """Colocated: this worker's own prefill computes straight into the blocks, and decoding goes on there.

    The block table changes hands inside the engine, without a copy and without losing a step. The engine may be ahead
    of the handoff, perhaps to the last token: what it samples after the first one is held until the seal.
    """

    local = True
    _prefill: Listener
    _held: list[NewToken]

    def lend(self, prefill: Listener) -> Sequence:
        """The sequence that computes the prompt in these blocks; `prefill` gets its events, up to the first token.

        Raises TransferFailed when they are lent already, or the reservation is over.
        """
        self._advance(ReservationState.RESERVED, ReservationState.PREFILLING)
        self._sealed_s = time.monotonic()
        self._prefill, self._held = prefill, []
        names = self.order.block_names
        self._sequence = Sequence(self.request, self.listener, decode_here=True, table=self.table, prompt_names=names)
        return self._sequence

    def listener(self, event: EngineEvent) -> None:
        """See Reservation."""
        if isinstance(event, NewToken) and event.position > 0:
            if self.state is ReservationState.PREFILLING:
                self._held.append(event)
            else:
                super().listener(event)
            return
        self._prefill(event)
        if isinstance(event, Failed):
            super().listener(event)

    def claim(self) -> None:
        """By the Prefill call that it is lent to: nobody else comes this way."""
        self._advance(ReservationState.PREFILLING, ReservationState.PREFILLING)

    def writing(self) -> AbstractContextManager[None]:
        """The engine alone writes, and frees the blocks between its own steps."""
        return nullcontext()

    async def sealed(self, first_token: int, summary: TransferSummary) -> None:
        """The router knows the first token: the others may follow. Raises TransferFailed when the reservation is over.

        The engine went on by itself, perhaps to the end.
        """
        self._advance(ReservationState.PREFILLING, ReservationState.DECODING)
        for event in self._held:
            super().listener(event)

    def end(self, cause: TandemError | None = None) -> None:
        """See Reservation. The engine drops the sequence without a word, and the Prefill call waits for its token."""
        prefilling = self.state is ReservationState.PREFILLING
        super().end(cause)
        if prefilling:
            self._prefill(Failed(cause or TransferFailed("the reservation ended before the handoff")))
