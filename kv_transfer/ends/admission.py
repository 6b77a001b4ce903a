"""Whether a transfer may touch a reservation: asked by every carrier before anything is written."""

from __future__ import annotations

from kv_transfer.base import IncomingTransfer, IncomingTransfers
from kv_transfer.frames.layout import Coverage, KVLayout
from kv_transfer.frames.messages import Open
from tandem.errors import Refused, TransferFailed


class TransferAdmission:
    """The checks between an opening and the first write."""

    def __init__(self, transfers: IncomingTransfers, local: bool = False) -> None:
        """local: for the carrier that moves nothing."""
        self._transfers = transfers
        self._local = local
        self.layout = KVLayout.of(transfers.fingerprint)

    def claim(self, opening: Open) -> IncomingTransfer:
        """What the opening names, from now on this transfer's own.

        Raises TransferFailed for an unknown reservation, another request or attempt, KV that comes another way than
        promised (into blocks that this worker computes in, above all), and one that has its transfer: these concern
        the caller alone, the reservation goes on waiting for its true sender.
        """
        incoming = self._transfers.find(opening.reservation_id)
        if opening.request_id != incoming.request_id:
            raise TransferFailed(f"the reservation is not of request {opening.request_id}")
        if opening.attempt != incoming.attempt:
            raise TransferFailed(f"attempt {opening.attempt} of request {opening.request_id} is not the current one")
        if incoming.local is not self._local:
            where = "computed in place" if incoming.local else "sent by another worker"
            raise TransferFailed(f"the KV of request {opening.request_id} is to be {where}")
        incoming.claim()
        return incoming

    def check(self, incoming: IncomingTransfer, opening: Open) -> Coverage:
        """What must arrive. Raises Refused or TransferFailed when it would not fit: it has failed then."""
        difference = self._transfers.fingerprint.difference(opening.fingerprint)
        if difference is not None:
            raise Refused(f"prefill and decode workers do not fit: {difference}")
        self.layout.check_pool(incoming.pool, incoming.blocks, incoming.prompt_tokens)
        expected = range(incoming.cached_tokens, incoming.prompt_tokens)
        if (opening.token_start, opening.token_stop) != (expected.start, expected.stop):
            raise TransferFailed(
                f"the sender offers positions [{opening.token_start}, {opening.token_stop}) "
                f"where [{expected.start}, {expected.stop}) are missing"
            )
        return Coverage(self.layout.num_layers, expected)
