"""How fast workers are, as measured: by which a request is refused that cannot meet its deadline."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from tandem.errors import Overloaded

# Of a worker's busy time, so much counts; what was before fades.
MEMORY_S = 10.0
# A pace that nothing has been measured of for this long, and that nobody is measuring, is forgotten: whatever slowed
# the worker down may be over, and a service that refuses must find out.
STALE_S = 5.0
# What stands before a request takes longer than it is said to: others are served in between, and the pace varies.
MARGIN = 1.25


class PrefillPace:
    """The prompts that a worker is to compute, and how many tokens a second it gets through while it has some.

    placed ──sent──▶ with the worker ──its first token: computed──▶ over
       └───────────────────┴── anything else: dropped ──▶ over
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        # Tokens to compute, by request.
        self._placed: dict[str, int] = {}
        self._sent: set[str] = set()
        # Until when busy time is counted in.
        self._at_s = -math.inf
        self._tokens = self._busy_s = 0.0

    def placed(self, key: str, tokens: int) -> None:
        self._placed[key] = tokens

    def sent(self, key: str) -> None:
        now_s = self._clock()
        if not self._sent:
            if self._forgotten(now_s):
                self._tokens = self._busy_s = 0.0
            self._at_s = now_s
        self._sent.add(key)

    def computed(self, key: str, tokens: int) -> None:
        if key in self._sent:
            self._note(tokens)
        self._forget(key)

    def dropped(self, key: str) -> None:
        """Does nothing for what is over."""
        self.computed(key, 0)

    def _forget(self, key: str) -> None:
        self._placed.pop(key, None)
        self._sent.discard(key)

    def _note(self, tokens: int) -> None:
        now_s = self._clock()
        passed_s, self._at_s = now_s - self._at_s, now_s
        fade = math.exp(-passed_s / MEMORY_S)
        self._tokens, self._busy_s = self._tokens * fade + tokens, self._busy_s * fade + passed_s

    @property
    def queued_tokens(self) -> int:
        return sum(self._placed.values())

    def seconds(self, tokens: int) -> float:
        """That so many tokens take; 0 while nothing is known."""
        now_s = self._clock()
        if self._tokens == 0 or self._forgotten(now_s):
            return 0.0
        # A worker that is stuck is slow from now on, not from the end of its prompt on.
        busy_s = self._busy_s + (now_s - self._at_s if self._sent else 0.0)
        return tokens * busy_s / self._tokens

    def _forgotten(self, now_s: float) -> bool:
        return not self._sent and now_s - self._at_s > STALE_S


class DecodePace:
    """Seconds between two tokens of an answer, as a line over the number of answers that are decoded at once.

    The line is fitted to a worker's steps, each as heavy as it was long. It never falls with the number, and never
    grows faster: one answer more costs at most one share more. Of numbers that were never seen it says what it must.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._at_s = -math.inf
        self._decoding = 0
        self._weight = self._live = self._live2 = self._gap = self._live_gap = 0.0

    def stepped(self, tokens: int, decoding: int) -> None:
        """A step brought these tokens; decoding: answers that go on after it."""
        now_s = self._clock()
        if self._decoding and tokens:
            self._note(now_s - self._at_s, tokens, max(self._decoding, 1))
        elif self._forgotten(now_s):
            self._weight = self._live = self._live2 = self._gap = self._live_gap = 0.0
        self._at_s, self._decoding = now_s, decoding

    def _note(self, passed_s: float, tokens: int, live: int) -> None:
        gap_s, fade = passed_s * live / tokens, math.exp(-passed_s / MEMORY_S)
        self._weight = self._weight * fade + passed_s
        self._live = self._live * fade + passed_s * live
        self._live2 = self._live2 * fade + passed_s * live * live
        self._gap = self._gap * fade + passed_s * gap_s
        self._live_gap = self._live_gap * fade + passed_s * live * gap_s

    def gap_s(self, live: int) -> float:
        """When so many answers are decoded at once; 0 while nothing is known."""
        if self._weight == 0 or self._forgotten(self._clock()):
            return 0.0
        mean, gap = self._live / self._weight, self._gap / self._weight
        variance = self._live2 / self._weight - mean * mean
        slope = (self._live_gap / self._weight - mean * gap) / (variance + 0.01 * mean * mean)
        return gap + min(max(slope, 0.0), gap / mean) * (live - mean)

    def _forgotten(self, now_s: float) -> bool:
        return self._decoding == 0 and now_s - self._at_s > STALE_S


class OutputShare:
    """How much of the output that they may have answers turned out to have, lately."""

    # The last 64 answers have most of the weight.
    _FADE = 1 - 1 / 64

    def __init__(self) -> None:
        self._had = self._allowed = 0.0

    def ended(self, tokens: int, max_tokens: int) -> None:
        self._had = self._had * self._FADE + tokens
        self._allowed = self._allowed * self._FADE + max_tokens

    def expected(self, max_tokens: int) -> float:
        return max_tokens * self._had / self._allowed if self._allowed else 0.0


@dataclass(frozen=True)
class Ahead:
    """What a request would meet on the two workers that it would be placed on now."""

    prefill: PrefillPace
    decode: DecodePace
    # Answers that are placed on the decode worker, and those that it decodes now.
    placed: int
    decoding: int
    # Blocks that its pool has too few of, as a share of the pool.
    missing: float


def check_deadline(ahead: Ahead, prompt_tokens: int, output_tokens: float, answers: int, remaining_s: float) -> None:
    """prompt_tokens: to compute; output_tokens: that each of its answers is expected to have.

    Raises Overloaded when the answers would come too late. With nothing ahead of it a request is never refused: it may
    find that the workers have become faster.
    """
    queued = ahead.prefill.queued_tokens
    if not (queued or ahead.placed):
        return
    alone_s = ahead.prefill.seconds(prompt_tokens) + output_tokens * ahead.decode.gap_s(1)
    live = ahead.decoding if ahead.missing else ahead.placed + answers
    decode_s = output_tokens * ahead.decode.gap_s(max(1, live)) * (1 + ahead.missing)
    whole_s = ahead.prefill.seconds(queued + prompt_tokens * answers) + decode_s
    needed_s = alone_s + MARGIN * max(0.0, whole_s - alone_s)
    if needed_s > remaining_s:
        words = (
            f"with what is ahead of it, it would take about {needed_s:.2g} s; its deadline is in {remaining_s:.2g} s"
        )
        raise Overloaded(words, retry_after_ms=round(1000 * min(max(needed_s - remaining_s, 0.1), 60.0)))
