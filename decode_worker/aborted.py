"""What was aborted lately."""

from __future__ import annotations

from collections import OrderedDict

from tandem.errors import Unavailable
from tandem.types import EngineRequest

# Far more than the Reserve calls that can be on their way at once.
MOST = 4096


class Aborted:
    """The newest aborted attempt of each request: an Abort may overtake the Reserve call that it is meant for, which
    would then hold blocks for nobody until its lease ends. Bounded: the oldest is forgotten first.
    """

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._attempts: OrderedDict[str, int] = OrderedDict()

    def note(self, request_id: str, attempt: int) -> None:
        self._attempts[request_id] = max(attempt, self._attempts.pop(request_id, 0))
        if len(self._attempts) > self._most:
            self._attempts.popitem(last=False)

    def check(self, request: EngineRequest) -> None:
        """Raises Unavailable when this attempt was aborted before."""
        if request.attempt <= self._attempts.get(request.request_id, -1):
            raise Unavailable("the request was aborted before its reservation")
