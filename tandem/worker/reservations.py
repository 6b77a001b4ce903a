"""The reservations of a worker: its decode role makes them, transfers and its own prefill find them."""

from __future__ import annotations

from tandem.engine.block_pool import BlockTable
from tandem.errors import TransferFailed
from tandem.process import logs
from tandem.types import EngineRequest, Fingerprint
from tandem.worker.engine_thread import EngineThread
from tandem.worker.local_reservation import LocalReservation
from tandem.worker.reservation import Emit, IncomingReservation, Reservation, ReserveOrder


class Reservations(dict[str, Reservation]):
    """By id; kv_transfer's Landings."""

    def __init__(self, thread: EngineThread) -> None:
        super().__init__()
        self._thread = thread
        # The newest of each request.
        self._by_request: dict[str, Reservation] = {}

    @property
    def fingerprint(self) -> Fingerprint:
        """See Landings."""
        return self._thread.engine.fingerprint

    def make(self, order: ReserveOrder, table: BlockTable, emit: Emit) -> Reservation:
        """table: from now on the reservation's own. emit: gets its tokens, and what ends it."""
        kind = LocalReservation if order.local else IncomingReservation
        reservation = kind(self._thread, order, table, emit, self._forget)
        self[reservation.id] = self._by_request[reservation.request_id] = reservation
        return reservation

    def find(self, reservation_id: str) -> Reservation:
        """Raises TransferFailed for an id that was never made or is over. Ids are 128 random bits: a dict look-up
        tells a guesser nothing useful."""
        if (reservation := self.get(reservation_id)) is None:
            raise TransferFailed("no such reservation: it never was, or it is over")
        return reservation

    def find_local(self, reservation_id: str, request: EngineRequest) -> LocalReservation:
        """Where this worker's own prefill computes the request. Raises TransferFailed."""
        reservation = self.find(reservation_id)
        if reservation.request != request:
            raise TransferFailed(f"the reservation is not of this request {request.request_id}")
        if not isinstance(reservation, LocalReservation):
            raise TransferFailed(f"the reservation of request {request.request_id} is for KV from another worker")
        return reservation

    def of_request(self, request_id: str) -> Reservation | None:
        return self._by_request.get(request_id)

    def _forget(self, reservation: Reservation) -> None:
        logs.of_request(__name__, reservation.request_id).debug("its reservation is over")
        del self[reservation.id]
        if self._by_request.get(reservation.request_id) is reservation:
            del self._by_request[reservation.request_id]
