"""What a decode worker is to a KV transfer, for tests: reservations that check how they are used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from kv_transfer.base import TransferSummary, TransferTarget
from tandem.errors import TandemError, TransferFailed
from tandem.types import Fingerprint


class FakeReservation:
    """A reservation that checks how it is used."""

    def __init__(self, pool: Tensor, blocks: Sequence[int], target: TransferTarget, local: bool = False) -> None:
        self.pool = pool
        self.blocks = tuple(blocks)
        self.request_id = target.request_id
        self.attempt = target.attempt
        self.cached_tokens = target.cached_tokens
        self.prompt_tokens = target.prompt_tokens
        self.local = local
        self.claimed = False
        self.broken = False
        # The sender may write for a while after the end: the blocks are quarantined until then.
        self.one_sided = False
        self.refuse_seal: TandemError | None = None
        self.writers = 0
        self.touches = 0
        self.first_token: int | None = None
        self.given_up = False
        self.summary: TransferSummary | None = None
        self.errors: list[TandemError] = []
        self._tell_over: Callable[[TandemError], None] | None = None

    def claim(self) -> None:
        if self.claimed:
            raise TransferFailed(f"the reservation of request {self.request_id} already has its transfer")
        self.claimed = True

    @contextmanager
    def writing(self) -> Iterator[None]:
        if self.broken:
            raise TransferFailed("the lease of the reservation is broken")
        assert not self.ended, "a write after the end"
        self.writers += 1
        try:
            yield
        finally:
            self.writers -= 1

    def touch(self) -> None:
        self.touches += 1

    def when_over(self, tell: Callable[[TandemError], None]) -> None:
        self._tell_over = tell

    @property
    def watched(self) -> bool:
        """By a transfer that has opened it."""
        return self._tell_over is not None

    def break_lease(self) -> None:
        self.broken = True
        if self._tell_over is not None:
            self._tell_over(TransferFailed("the lease of the reservation is broken"))

    async def sealed(self, first_token: int, summary: TransferSummary) -> None:
        assert self.writers == 0
        assert not self.ended
        if self.refuse_seal is not None:
            raise self.refuse_seal
        self.first_token, self.summary = first_token, summary

    def failed(self, error: TandemError) -> None:
        assert self.writers == 0 or self.one_sided, "blocks would be given back under a writer"
        assert not self.ended, "a second end"
        self.errors.append(error)

    def abandoned(self) -> None:
        assert self.writers == 0, "blocks would be given back under a writer"
        assert not self.ended, "a second end"
        self.given_up = True

    @property
    def ended(self) -> bool:
        return bool(self.errors) or self.first_token is not None or self.given_up


@dataclass
class FakeReservations:
    fingerprint: Fingerprint
    by_id: dict[str, FakeReservation] = field(default_factory=dict)

    def find(self, reservation_id: str) -> FakeReservation:
        if reservation_id not in self.by_id:
            raise TransferFailed("the reservation is unknown or has expired")
        return self.by_id[reservation_id]
