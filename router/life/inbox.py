"""Everything that happens to one attempt, in the order of its arrival."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import NamedTuple

from router.life.events import EmitPacer
from router.life.output import TokenStep
from tandem import errors, wire
from tandem.types import FinishReason, Role
from tandem.v1 import worker_pb2

# A client that reads leaves fewer steps waiting. Where thousands of answers wait for turns, some are packed in vain.
UNPACKED_STEPS = 64
# Steps of one taking: with 20 log probabilities a token, unpacking so many takes the event loop about 10 ms.
MOST_AT_ONCE = 256


class Stage(StrEnum):
    """Who has told what of an attempt. Two connections: decode tokens can overtake the first token.

        waiting ──first token──▶ handing off ──sealed, or decode tokens──▶ decoding ──the last──▶ ended
          │                           └──▶ the first was the last: nobody decodes ────────────────▶ ended
          └──decode tokens──▶ overtaken ──first token──▶ decoding
                                  └──the last──▶ all but first ──first token──▶ ended

        any but ended ──a worker that is needed is lost, or what it tells is wrong──▶ failed

    The prefill worker is needed until its token has come and decode runs, which it does only on sealed KV. The decode
    worker is needed until it has told its last token. A deadline and a client that leaves come as cancellation of the
    attempt's task, in any state.
    """

    WAITING = "waiting"
    OVERTAKEN = "overtaken"
    ALL_BUT_FIRST = "all but first"
    HANDING_OFF = "handing off"
    DECODING = "decoding"
    ENDED = "ended"
    FAILED = "failed"


_NEEDED: dict[Role, frozenset[Stage]] = {
    Role.PREFILL: frozenset({Stage.WAITING, Stage.OVERTAKEN, Stage.ALL_BUT_FIRST, Stage.HANDING_OFF}),
    Role.DECODE: frozenset({Stage.WAITING, Stage.OVERTAKEN, Stage.HANDING_OFF, Stage.DECODING}),
}


class Lost(NamedTuple):
    """A worker of the attempt, in its role."""

    role: Role
    error: errors.TandemError


Arrival = worker_pb2.RequestTokens | worker_pb2.FirstToken | worker_pb2.Sealed | Lost


class Inbox:
    """Takes in what workers tell of one attempt, and keeps the steps that its choice has not taken yet.

    Position 0 comes from the prefill worker, the others from the decode worker: decode steps wait for the first token.
    Bounded by max_tokens: a worker that sends more fails the attempt. What may not come in a state changes nothing.
    """

    def __init__(
        self,
        max_tokens: int,
        clock_ms: Callable[[], float],
        pacer: EmitPacer,
        offer: Callable[[], object],
        fail: Callable[[errors.TandemError], object],
        given: Sequence[int] = (),
    ) -> None:
        """offer: called when there is something to take, and not again before it is taken. fail: called once, if it
        fails. given: ids of the answer's tokens that its client has from an earlier attempt; the first of them at most.
        """
        self.state = Stage.WAITING
        self._max_tokens = max_tokens
        self._clock_ms = clock_ms
        self._pacer = pacer
        # Between asking the pacer for a turn and getting it.
        self._asked = False
        self._offer, self._offered = offer, False
        self._on_failure = fail
        self._given = given
        # What waits for a slow client is bytes, a tenth of its objects' size.
        self._steps: deque[TokenStep | bytes] = deque()
        self._next_position = 1
        # When the decode worker's first tokens arrived.
        self.decoding_since_ms: float | None = None
        self.decode_gap_ms: float | None = None
        self.sealed: worker_pb2.Sealed | None = None

    def needs(self, role: Role) -> bool:
        return self.state in _NEEDED[role]

    def put(self, arrival: Arrival) -> None:
        match arrival, self.state:
            case worker_pb2.RequestTokens(), Stage.HANDING_OFF | Stage.DECODING:
                if self._add(arrival):
                    self.state = Stage.ENDED if arrival.finish_reason else Stage.DECODING
                    if not self._asked:
                        self._asked = True
                        self._pacer.ask(self._take_turn)
            case worker_pb2.RequestTokens(), Stage.WAITING | Stage.OVERTAKEN:
                if self._add(arrival):
                    self.state = Stage.ALL_BUT_FIRST if arrival.finish_reason else Stage.OVERTAKEN
            case worker_pb2.FirstToken(), Stage.WAITING | Stage.OVERTAKEN | Stage.ALL_BUT_FIRST as before:
                if self._add_first(arrival):
                    last = arrival.finish_reason or before is Stage.ALL_BUT_FIRST
                    going_on = Stage.HANDING_OFF if before is Stage.WAITING else Stage.DECODING
                    self.state = Stage.ENDED if last else going_on
                    self._offer_steps()  # the first token waits for no turn
            case worker_pb2.Sealed(), state:
                self.sealed = arrival
                self.state = Stage.DECODING if state is Stage.HANDING_OFF else state
            case Lost(), _ if self.needs(arrival.role):
                self._fail(arrival.error)

    def _add(self, message: worker_pb2.RequestTokens) -> bool:
        error = wire.failure_from_wire(message.failure) if message.HasField("failure") else self._problem(message)
        if error is not None:
            self._fail(error)
            return False
        if self.decoding_since_ms is None:
            self.decoding_since_ms = self._clock_ms()
            self.decode_gap_ms = message.decode_gap_ms if message.HasField("decode_gap_ms") else None
        self._next_position += len(message.tokens)
        self._steps.append(_step(message) if len(self._steps) < UNPACKED_STEPS else _packed(message))
        return True

    def _problem(self, message: worker_pb2.RequestTokens) -> errors.TandemError | None:
        reason, count = wire.reason_from_wire(message.finish_reason), len(message.tokens)
        if reason in (FinishReason.ABORT, FinishReason.ERROR):
            return errors.Unavailable(f"the decode worker ended the request ({reason}) and gave no cause")
        if count and message.position != self._next_position:
            return errors.InternalError(
                f"the decode worker sent position {message.position} where {self._next_position} was due"
            )
        if self._next_position + count > self._max_tokens:
            return errors.InternalError(f"the decode worker sent more than max_tokens={self._max_tokens} tokens")
        return None

    def _add_first(self, first: worker_pb2.FirstToken) -> bool:
        token = wire.token_from_wire(first.token)
        if self._given and token.id != self._given[0]:
            words = f"the first token was {self._given[0]}, the second attempt says {token.id}"
            self._fail(errors.InternalError(words))
            return False
        self._steps.appendleft(TokenStep(() if self._given else (token,), wire.reason_from_wire(first.finish_reason)))
        return True

    def _fail(self, error: errors.TandemError) -> None:
        self.state = Stage.FAILED
        self._on_failure(error)

    # What the choice takes.

    def _take_turn(self) -> None:
        self._asked = False
        self._offer_steps()

    def _offer_steps(self) -> None:
        if self._steps and not self._offered:
            self._offered = True
            self._offer()

    def take(self) -> list[TokenStep]:
        """What was offered; of much, the first part, and the rest is offered again. Nothing once it has failed."""
        if not self._offered or self.state is Stage.FAILED:
            return []
        some = [self._steps.popleft() for _ in range(min(len(self._steps), MOST_AT_ONCE))]
        self._offered = False
        self._offer_steps()
        unpacked = worker_pb2.RequestTokens.FromString
        return [_step(unpacked(each)) if isinstance(each, bytes) else each for each in some]


def _step(message: worker_pb2.RequestTokens) -> TokenStep:
    return TokenStep(tuple(map(wire.token_from_wire, message.tokens)), wire.reason_from_wire(message.finish_reason))


def _packed(message: worker_pb2.RequestTokens) -> bytes:
    return worker_pb2.RequestTokens(tokens=message.tokens, finish_reason=message.finish_reason).SerializeToString()
