"""Whether a transfer may touch a landing: asked by every transport before anything is written."""

from __future__ import annotations

from weakref import WeakSet

from kv_transfer.base import Landing, Landings
from kv_transfer.coverage import Coverage
from kv_transfer.layout import KVLayout
from kv_transfer.messages import Open
from tandem.errors import Refused, TransferFailed


class Claims:
    """Landings that a transfer has opened, whatever became of it: each takes one in its life.

    The transports of one worker share one, so that two of them never meet in a landing.
    """

    def __init__(self) -> None:
        self._taken: WeakSet[Landing] = WeakSet()

    def take(self, landing: Landing) -> None:
        if landing in self._taken:
            raise TransferFailed(f"the reservation of request {landing.request_id} already has its transfer")
        self._taken.add(landing)


class Admission:
    """The checks between an opening and the first write."""

    def __init__(self, landings: Landings, claims: Claims | None, local: bool = False) -> None:
        """local: of the transport that moves nothing."""
        self._landings = landings
        self._local = local
        self._claims = Claims() if claims is None else claims
        self.layout = KVLayout.of(landings.fingerprint)

    def claim(self, opening: Open) -> Landing:
        """The landing, from now on this transfer's own.

        Raises TransferFailed for an unknown reservation, another request or attempt, KV that comes another way than
        promised (into blocks that this worker computes in, above all), and a landing that is taken: these concern the
        caller alone, the landing goes on waiting for its true sender.
        """
        landing = self._landings.find(opening.reservation_id)
        if opening.request_id != landing.request_id:
            raise TransferFailed(f"the reservation is not of request {opening.request_id}")
        if opening.attempt != landing.attempt:
            raise TransferFailed(f"attempt {opening.attempt} of request {opening.request_id} is not the current one")
        if landing.local is not self._local:
            where = "computed in place" if landing.local else "sent by another worker"
            raise TransferFailed(f"the KV of request {opening.request_id} is to be {where}")
        self._claims.take(landing)
        return landing

    def check(self, landing: Landing, opening: Open) -> Coverage:
        """What must arrive. Raises Refused or TransferFailed when it would not fit: the landing has failed then."""
        difference = self._landings.fingerprint.difference(opening.fingerprint)
        if difference is not None:
            raise Refused(f"prefill and decode workers do not fit: {difference}")
        self.layout.check_pool(landing.pool, landing.blocks, landing.prompt_tokens)
        expected = range(landing.cached_tokens, landing.prompt_tokens)
        if (opening.token_start, opening.token_stop) != (expected.start, expected.stop):
            raise TransferFailed(
                f"the sender offers positions [{opening.token_start}, {opening.token_stop}) "
                f"where [{expected.start}, {expected.stop}) are missing"
            )
        return Coverage(self.layout.num_layers, expected)
