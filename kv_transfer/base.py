"""What a transfer is, whatever carries it: the values and the Protocols that transports and workers meet at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Protocol

from torch import Tensor

from kv_transfer.frames.layout import KVLayout
from tandem.errors import TandemError
from tandem.types import Fingerprint
from tandem.v1 import registry_pb2


@dataclass(frozen=True, eq=False)
class Source:
    """Where a sender reads. The blocks stay as they are until the transfer's context is left.

    On cuda, reads go to the default stream: positions handed to `Sender.send` must have been written on that stream,
    or on another one that the writer has synchronized.
    """

    # [L, 2, N, P, K, D], see kv_transfer/frames/layout.py.
    pool: Tensor
    # The prompt's block table.
    blocks: Sequence[int]
    layout: KVLayout


@dataclass(frozen=True)
class TransferTarget:
    """What the router told the sender about the reservation that waits for the KV."""

    reservation_id: str
    request_id: str
    attempt: int
    # host:port of the receiving worker; unused by the local transport.
    address: str
    # Leading positions that the receiver has already: they do not travel.
    cached_tokens: int
    prompt_tokens: int
    # The sender's own model's.
    fingerprint: Fingerprint
    # The request's deadline, from now; both ends give up then.
    deadline_s: float | None = None

    @property
    def travelling(self) -> range:
        return range(self.cached_tokens, self.prompt_tokens)


@dataclass(frozen=True)
class TransferSummary:
    """What moved, as one of the ends saw it."""

    # Payload alone, in the wire dtype and without headers; 0 when nothing had to be copied.
    bytes: int
    frames: int
    # At the sender the time in which something was under way, at the receiver from the opening to the seal.
    seconds: float
    # Seconds of the sender that lay before the end of prefill: hidden under compute.
    hidden_seconds: float = 0.0


@dataclass
class Counters:
    """One end's totals since it started, for heartbeats and metrics. Bytes and frames count as they move."""

    transfers: int = 0
    failures: int = 0
    bytes: int = 0
    frames: int = 0
    # Sums over sealed transfers; see TransferSummary.
    seconds: float = 0.0
    hidden_seconds: float = 0.0
    # Frames that came to this end and failed a checksum.
    corrupt_frames: int = 0

    def as_wire(self) -> registry_pb2.KVTraffic:
        return registry_pb2.KVTraffic(**asdict(self))

    def moved(self, size: int) -> None:
        self.frames += 1
        self.bytes += size

    def sealed(self, seconds: float, hidden_seconds: float = 0.0) -> None:
        self.transfers += 1
        self.seconds += seconds
        self.hidden_seconds += hidden_seconds


class Sender(Protocol):
    """One open transfer. Calls come one at a time, except that `abandon` may come while `send` waits."""

    async def send(self, layers: range, tokens: range) -> None:
        """KV of these positions is final in these layers: move it. A layer's positions ascend without gaps.

        Those that the receiver has cached are skipped.

        Returns when there is room for more: it waits while the receiver is slow, and the last frames may still be under
        way. Raises TransferFailed, WorkerLost, DeadlineExceeded or Refused, whatever the receiver said, as soon as it
        is known; what is known later is raised by the next call.
        """

    async def seal(self, first_token: int, prefilled_s: float | None = None) -> TransferSummary:
        """Returns when the receiver has verified and taken everything. Raises as send, and when KV is missing.

        prefilled_s: when the first token was sampled, on time.monotonic's clock; what was sent before was hidden.
        """

    async def abandon(self) -> None:
        """Instead of a seal: nobody needs this KV. The receiver's blocks are free on return, and nothing has failed.

        A send under way stops at its next frame. Raises as send.
        """


class Transport(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def counters(self) -> Counters: ...

    def open(self, source: Source, target: TransferTarget) -> AbstractAsyncContextManager[Sender]:
        """Leaving the context without a seal aborts the transfer; no thread reads the source's blocks after it.

        Raises Refused when source and target do not fit.
        """

    async def aclose(self) -> None:
        """Transfers still open fail; what the transport holds for others is gone on return."""


class IncomingTransfer(Protocol):
    """A reservation, as the receiving end sees it. All calls come from the event loop.

    claim ──▶ writing, touch ──▶ sealed, abandoned or failed
    """

    @property
    def request_id(self) -> str: ...

    @property
    def attempt(self) -> int: ...

    @property
    def pool(self) -> Tensor: ...

    @property
    def blocks(self) -> Sequence[int]:
        """The block table, cached prefix included."""

    @property
    def cached_tokens(self) -> int: ...

    @property
    def prompt_tokens(self) -> int: ...

    @property
    def local(self) -> bool:
        """The prompt is computed in place, into these very blocks: no KV may come from anywhere else."""

    def claim(self) -> None:
        """A transfer opens it. Raises TransferFailed for a second one, whatever became of the first."""

    def writing(self) -> AbstractContextManager[None]:
        """Keeps the blocks from reuse while inside, even if the lease breaks: a late write lands nowhere.

        Entered several times at once, once for each write under way. Raises TransferFailed when the lease is broken.
        """

    def touch(self) -> None:
        """KV arrives: extends the lease."""

    def when_over(self, tell: Callable[[TandemError], None]) -> None:
        """Tells the transfer when the reservation ends before the seal, by its lease or whatever else: why."""

    async def sealed(self, first_token: int, summary: TransferSummary) -> None:
        """Everything is there and verified, nothing writes any more: decode may start.

        Raises TransferFailed when the lease broke meanwhile.
        """

    def abandoned(self) -> None:
        """The request ended with its first token: no KV is needed, nothing writes any more."""

    def failed(self, error: TandemError) -> None:
        """The transfer ended in any other way. Called once, also after a broken lease.

        Nothing writes any more, except inside `writing`: a sender that can write by itself may have to be waited for.
        """


class IncomingTransfers(Protocol):
    """The reservations of a worker."""

    @property
    def fingerprint(self) -> Fingerprint: ...

    def find(self, reservation_id: str) -> IncomingTransfer:
        """Raises TransferFailed for an id that is unknown or expired. Ids are secrets that the worker made."""
