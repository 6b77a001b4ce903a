"""From the one token stream of a decode worker to the mailbox of each choice."""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import Callable
from typing import Any

from router.life.emit_pacer import Turns
from router.life.output import Step
from router.pool.pace import DecodePace
from tandem import errors, rpc, wire
from tandem.types import FinishReason
from tandem.v1 import worker_pb2

# A client that reads leaves fewer steps waiting. Where thousands of answers wait for turns, some are packed in vain.
UNPACKED_STEPS = 64
# Steps of one taking: with 20 log probabilities a token, unpacking so many takes the event loop about 10 ms.
MOST_AT_ONCE = 256
# Requests of a step that are sorted in one pass of the event loop, 6 µs each. With 16, a router that is short of time
# is behind its workers by a second.
MOST_IN_A_PASS = 64


class Mailbox:
    """What workers produced for one attempt and its choice has not taken yet, in position order.

        waiting ──first token──▶ open ──finish reason──▶ ended     (decode_ended: the decode worker said so itself)
           └───────────────────────┴──fail──▶ failed               (the choice is ended by its watcher)

    Position 0 comes from the prefill worker, the others from the decode worker, on two streams: decode steps wait for
    the first token. Bounded by max_tokens: a worker that sends more fails the choice.
    """

    def __init__(
        self, max_tokens: int, clock_ms: Callable[[], float], turns: Turns, on_decode_end: Callable[[], object]
    ) -> None:
        """on_decode_end is called once, when the decode worker has said that it is done."""
        self._max_tokens = max_tokens
        self._turns = turns
        # Between asking for a turn and getting it.
        self._asked = False
        self._on_decode_end = on_decode_end
        self._clock_ms = clock_ms
        # The prefill worker told its token: nobody else can.
        self.first_arrived = False
        # What waits for a slow client is bytes, a tenth of its objects' size.
        self._steps: deque[Step | bytes] = deque()
        self._next_position = 1
        self._arrival = asyncio.Event()
        self._failure: asyncio.Future[errors.TandemError] = asyncio.get_running_loop().create_future()
        # When the decode worker's first tokens arrived.
        self.decoding_since_ms: float | None = None
        self.decode_gap_ms: float | None = None
        # The decode worker reported the end itself: it holds nothing any more.
        self.decode_ended = False

    def put_first(self, step: Step) -> None:
        """The first token waits for no turn."""
        self.first_arrived = True
        self._steps.appendleft(step)
        self._arrival.set()

    def put_decoded(self, message: worker_pb2.RequestTokens) -> None:
        reason = wire.reason_from_wire(message.finish_reason)
        failed = message.HasField("failure")
        if (reason is not None or failed) and not self.decode_ended:
            self.decode_ended = True
            self._on_decode_end()
        error = wire.failure_from_wire(message.failure) if failed else self._problem(message, reason)
        if error is not None:
            self.fail(error)
            return
        if self.decoding_since_ms is None:
            self.decoding_since_ms = self._clock_ms()
            self.decode_gap_ms = message.decode_gap_ms if message.HasField("decode_gap_ms") else None
        self._next_position += len(message.tokens)
        self._steps.append(_packed(message) if len(self._steps) >= UNPACKED_STEPS else _step(message))
        if self.first_arrived and not self._asked:
            self._asked = True
            self._turns.ask(self._take_turn)

    def _take_turn(self) -> None:
        self._asked = False
        if self._steps:
            self._arrival.set()

    def _problem(self, message: worker_pb2.RequestTokens, reason: FinishReason | None) -> errors.TandemError | None:
        if reason in (FinishReason.ABORT, FinishReason.ERROR):
            return errors.Unavailable(f"the decode worker ended the request ({reason}) and gave no cause")
        count = len(message.tokens)
        if count and message.position != self._next_position:
            return errors.InternalError(
                f"the decode worker sent position {message.position} where {self._next_position} was due"
            )
        if self._next_position + count > self._max_tokens:
            return errors.InternalError(f"the decode worker sent more than max_tokens={self._max_tokens} tokens")
        return None

    def fail(self, error: errors.TandemError) -> None:
        """The first failure counts."""
        if not self._failure.done():
            self._failure.set_result(error)

    async def watch(self) -> None:
        """Raises when the mailbox fails; else runs until it is cancelled."""
        raise await self._failure

    async def take(self) -> list[Step]:
        """What has arrived, at least one step; of much, the first part."""
        await self._arrival.wait()
        some = [self._steps.popleft() for _ in range(min(len(self._steps), MOST_AT_ONCE))]
        if not self._steps:
            self._arrival.clear()
        return [_unpacked(each) if isinstance(each, bytes) else each for each in some]


def _step(message: worker_pb2.RequestTokens) -> Step:
    return Step(tuple(map(wire.token_from_wire, message.tokens)), wire.reason_from_wire(message.finish_reason))


def _packed(message: worker_pb2.RequestTokens) -> bytes:
    return worker_pb2.RequestTokens(tokens=message.tokens, finish_reason=message.finish_reason).SerializeToString()


def _unpacked(data: bytes) -> Step:
    return _step(worker_pb2.RequestTokens.FromString(data))


class Subscription:
    """The token stream from one decode worker to this router, and the mailboxes that it fills."""

    def __init__(self) -> None:
        # Fresh for every connection and not guessable: tokens of a former one can never arrive here.
        self.id = secrets.token_hex(16)
        self._boxes: dict[tuple[str, int], Mailbox] = {}
        # Those whose answers have begun to be decoded and go on.
        self._decoding: set[tuple[str, int]] = set()
        self.pace = DecodePace()
        self._call: Any = None

    async def open(self, stub: Any, timeout_s: float) -> None:
        """Returns when the worker has accepted the stream. Raises grpc.RpcError or TimeoutError."""
        self._call = stub.Subscribe(worker_pb2.SubscribeRequest(subscriber_id=self.id))
        async with asyncio.timeout(timeout_s):
            await self._call.wait_for_connection()

    @property
    def is_open(self) -> bool:
        return self._call is not None and not self._call.done()

    @property
    def placed(self) -> int:
        """Answers that have a mailbox."""
        return len(self._boxes)

    @property
    def decoding(self) -> int:
        return len(self._decoding)

    def register(self, request_id: str, attempt: int, box: Mailbox) -> None:
        self._boxes[request_id, attempt] = box

    def forget(self, request_id: str, attempt: int) -> None:
        self._boxes.pop((request_id, attempt), None)
        self._decoding.discard((request_id, attempt))

    async def pump(self) -> None:
        """Fills mailboxes until the stream ends, which raises Unavailable or grpc.RpcError."""
        while (batch := await rpc.read(self._call)) is not None:
            for number, message in enumerate(batch.requests, 1):
                self._dispatch(message)
                if number % MOST_IN_A_PASS == 0:  # lost just now, a worker's last words are too
                    await asyncio.sleep(0)
            self.pace.stepped(sum(len(message.tokens) for message in batch.requests), len(self._decoding))
        raise errors.Unavailable("it ended its token stream")

    def _dispatch(self, message: worker_pb2.RequestTokens) -> None:
        """Tokens of unknown requests and of stale attempts go nowhere: their choice has ended."""
        key = message.request_id, message.attempt
        box = self._boxes.get(key)
        if box is not None:
            box.put_decoded(message)
            (self._decoding.discard if box.decode_ended else self._decoding.add)(key)
